"""Steps on a GPU that is not there: no shape, device or collective is wrong, no read is new."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moepp_megatron.config import load_config
from tests.fake_gpu import build, cases, reads

pytestmark = [
    pytest.mark.skipif(build.obstacle() is not None, reason=str(build.obstacle())),
    pytest.mark.timeout(900),
]

Play = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def play(tmp_path_factory) -> Play:
    folder: Path = tmp_path_factory.mktemp("stub")
    build.build(folder)
    return lambda cases, engine=False: build.play(folder, cases, engine)


def sound(outcomes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for outcome in outcomes:
        assert outcome["error"] == "", outcome["error"]
        assert outcome["faults"] == []
        assert outcome["operations"] > 1000, "nothing was played"
    return outcomes


def excess(outcome: dict[str, Any], *per_step: dict[str, int], **per_layer: Any) -> dict[str, int]:
    """Reads that the tables do not allow."""
    allowed: dict[str, int] = {}
    for table in (reads.STEP, reads.WATCHED, *per_step):
        allowed |= table
    for table in per_layer.get("layer", ()):
        allowed |= {key: count * outcome["layers"] for key, count in table.items()}
    found = outcome["reads"]
    return {key: count for key, count in found.items() if count > allowed.get(key, 0)}


def test_local_modules(play: Play) -> None:
    outcomes = dict(zip(cases.LOCAL, sound(play(list(cases.LOCAL.values()))), strict=True))
    modules = {name: outcome["modules"] for name, outcome in outcomes.items()}
    assert modules["one rank"] == ["CausalAttention", "GroupedExperts"]
    assert modules["context parallel"] == ["ContextParallelAttention", "GroupedExperts"]
    tables = {
        "all-gather": (reads.ALL_GATHER, reads.PERMUTATION),
        "deduplicated": (reads.DEDUPLICATED,),
    }
    for name, outcome in outcomes.items():
        if name == "vanilla":
            # megatron-core's own layers, which are not counted.
            continue
        layer = tables.get(name, (reads.ALL_TO_ALL,))
        if name == "recompute":
            outcome["layers"] *= 2
        step = (reads.GUARD,) if name.startswith("guards") else ()
        assert excess(outcome, *step, layer=layer) == {}, name
    launches = outcomes["one rank"]["launches"]
    layers = outcomes["one rank"]["layers"]
    assert layers == 4
    # Forward and backward of the loss, in each of the two layers' micro-batches.
    for name in ("_reduce_logits", "_write_gradient"):
        assert launches.pop(name) == layers / 2
    # Forward and backward of router, numbering of rows, combine.
    assert launches == dict.fromkeys(launches, layers)
    assert len(launches) == 7


def test_transformer_engine(play: Play) -> None:
    names = list(cases.ENGINE)
    outcomes = dict(zip(names, sound(play(list(cases.ENGINE.values()), True)), strict=True))
    tables = {
        "all-gather": (reads.ALL_GATHER, reads.PERMUTATION, reads.FUSED_PERMUTATION),
        "deduplicated": (reads.DEDUPLICATED,),
    }
    for name, outcome in outcomes.items():
        assert outcome["modules"] == ["TEDotProductAttention", "TEGroupedMLP"]
        assert excess(outcome, layer=tables.get(name, (reads.ALL_TO_ALL,))) == {}, name


def test_what_would_fail_on_a_gpu_fails_here(play: Play) -> None:
    """A tensor that is left on the host, and a read that nobody knows of."""
    faulty = cases.smallest(parts=["plant"])
    (outcome,) = play([faulty])
    assert "found at least two devices, cuda:0 and cpu" in outcome["error"], outcome["error"]
    (outcome,) = sound(play([cases.smallest(parts=["plant read"])]))
    (new,) = excess(outcome, layer=(reads.ALL_TO_ALL,))
    assert new.startswith("item moepp_megatron/moe/")


@pytest.mark.slow
@pytest.mark.parametrize("engine", [False, True], ids=["local modules", "Transformer Engine"])
def test_every_shipped_configuration(play: Play, engine: bool) -> None:
    wanted = [
        cases.shipped(path)
        for path in (*cases.MODELS, *cases.PLANNED)
        # DeepEP has no stand-in here.
        if load_config(path, ["data.path=none", "run.dir=none"]).moe.dispatcher != "flex"
    ]
    if engine:
        # The stand-in knows one tensor-parallel rank.
        wanted = [each for each in wanted if "deepseek_v3_256_64_1024" not in each["config"]]
    else:
        # What these recompute needs Transformer Engine's experts.
        needs = ("_fp8.yaml", "deepseek_v3_256_64_1024.yaml")
        wanted = [each for each in wanted if not each["config"].endswith(needs)]
    for case, outcome in zip(wanted, play(wanted, engine), strict=True):
        assert outcome["error"] == "", f"{case}\n{outcome['error']}"
        assert outcome["faults"] == [], case
