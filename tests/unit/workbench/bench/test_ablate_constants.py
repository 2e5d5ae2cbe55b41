"""The arithmetic of the ablation of constant experts, and that its variants are valid."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import ablate_constants as ablation
from moepp_megatron.config import check_config, load_config


def run(loss: float) -> dict[str, float]:
    return {"valid_loss": loss, "ffn_share": 0.6, "constant_replaced": 0.2}


def test_differences_are_taken_within_a_seed() -> None:
    base = {1: run(3.0), 2: run(5.0), 3: run(4.0)}
    other = {1: run(3.1), 2: run(5.3)}
    rows = ablation.summary({"base": base, "zero init": other})
    assert rows["base"]["valid_loss"] == 4.0
    assert (rows["base"]["difference"], rows["base"]["half_width_95"]) == (0.0, 0.0)
    row = rows["zero init"]
    assert row["difference"] == pytest.approx(0.2)
    # Of 0.1 and 0.3 the deviation is sqrt(0.02), and that of their mean 0.1.
    assert row["half_width_95"] == pytest.approx(12.706 * 0.1, rel=1e-4)
    assert "+0.2000 +- 1.2706" in ablation.table(rows)
    alone = ablation.summary({"base": base, "zero init": {1: run(3.1)}})
    assert alone["zero init"]["half_width_95"] is None
    assert "| +0.1000 |" in ablation.table(alone)


@pytest.mark.parametrize("scale", ablation.SCALES)
def test_variants_are_valid_and_have_an_effect(scale: str) -> None:
    arguments = argparse.Namespace(scale=scale, steps=120, eval_iters=8, nproc=2, data=Path("data"))
    models = {}
    for name in ablation.variants(arguments.steps):
        config = load_config(ablation.QUICKSTART, ablation.overrides_of(arguments, name, seed=1))
        assert check_config(config) == [], name
        models[name] = config.moe
    assert len({repr(moe) for moe in models.values()}) == len(models)
