"""The table of the proof of `moepp thin`, on results that are made up."""

from typing import Any

from benchmarks.thin_proof import CHOSEN, PLACES, RECIPES, STEPS, table


def result(family: str, seed: int, recipe: str) -> dict[str, Any]:
    loss = {"control": 1.8, "budget": 1.98, "topk": 2.0 + 0.02 * seed, "zeda": 9.0}[recipe]
    loss = 99.0 if (family, seed) == CHOSEN else loss
    ends = {"0": {"code": 2.0, "prose": 2.0}, str(STEPS): {"code": loss, "prose": loss}}
    taken = 4.0 if recipe == "control" else 2.0
    return {
        "run": f"{family}-{seed}-{recipe}",
        "valid": ends,
        "ffn_per_token": {"0": 4.0, str(STEPS - 5): taken, str(STEPS): taken},
    }


def test_losses_are_over_the_source_and_over_the_control_without_the_source_that_chose() -> None:
    lines = table(result(*place, recipe) for place in PLACES for recipe in RECIPES).splitlines()
    assert lines[0].startswith("| 5 sources |")
    rows = dict(zip(("head", "line", "untrained", *RECIPES), lines, strict=True))
    assert rows["budget"].split(" | ")[1:5] == [
        *("50.0%", "-1.00% +- 0.00%", "-1.00% +- 0.00%", "+10.00% +- 0.00%")
    ]
    assert " 0.0% | -10.00% +- 0.00% |" in rows["control"]
    assert rows["topk"].endswith("| +0.00% +- 0.00% |")
    # Seeds 1, 2, 3 of one family and 2, 3 of the other: 2.776 standard errors of five.
    assert "| +2.20% +- 1.04% |" in rows["topk"]
