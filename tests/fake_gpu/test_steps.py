"""Steps on a GPU that is not there: no shape, device or collective is wrong, no read is new."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_gpu import build, cases, reads
from tests.fake_gpu.peaks import peaks, played_bytes

pytestmark = [
    pytest.mark.skipif(build.obstacle() is not None, reason=str(build.obstacle())),
    pytest.mark.timeout(900),
]

# Of an estimate of memory. What is played is exact for the modules that it plays.
TOLERANCE = 0.15
SMALL = cases.ROOT / cases.SMALLEST

FAULTY = [cases.smallest("model.num_layers=1", parts=[part]) for part in ("plant", "plant read")]

Outcomes = list[dict[str, Any]]
Play = Callable[..., Outcomes]


@pytest.fixture(scope="module")
def play(tmp_path_factory) -> Play:
    folder: Path = tmp_path_factory.mktemp("stub")
    build.build(folder)
    return lambda cases, engine=False: build.play(folder, cases, engine)


@pytest.fixture(scope="module")
def local(play: Play) -> tuple[Outcomes, Outcomes]:
    """What is played without Transformer Engine, in one process: `cases.LOCAL` and `FAULTY`."""
    outcomes = play([*cases.LOCAL.values(), *FAULTY])
    return outcomes[: -len(FAULTY)], outcomes[-len(FAULTY) :]


@pytest.fixture(scope="module")
def engine(play: Play) -> dict[str, Any]:
    """What is played with it, in another process: outcomes, and the planned memory of some."""
    changes = "model.num_layers=3", "training.micro_batch_size=4"
    (qwen3,) = (path for path in cases.PLANNED if path.stem == "qwen3_30b_a3b_32_64")
    # Norms of queries and keys, DeepEP, the combined schedule.
    rich = (
        "parallel.expert_model_parallel_size=16",
        "parallel.overlap_moe_expert_parallel_comm=true",
        "training.micro_batch_size=1",
        "training.recompute_granularity=null",
        "moe.dispatcher=flex",
    )
    wanted = {
        # With logits that outweigh layers, and the other way round.
        "peaks": [cases.whole(SMALL, *changes, f"model.vocab_size={n}") for n in (65536, 4096)],
        "layers": [cases.whole(qwen3, *rich, f"model.num_layers={n}") for n in (2, 3)],
        "steps": [(case, None) for case in cases.ENGINE.values()],
    }
    played = iter(play([case for each in wanted.values() for case, _ in each], True))
    return {name: [(next(played), plan) for _, plan in each] for name, each in wanted.items()}


def sound(outcomes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for outcome in outcomes:
        assert outcome["error"] == "", outcome["error"]
        assert outcome["faults"] == []
        assert outcome["kernels"] > 150 * max(1, outcome["layers"]), "nothing was played"
    return outcomes


def excess(outcome: dict[str, Any], layer: tuple[dict[str, int], ...]) -> dict[str, int]:
    """Reads that the tables do not allow."""
    allowed = dict(reads.STEP)
    for table in layer:
        allowed |= {key: count * outcome["layers"] for key, count in table.items()}
    found = outcome["reads"]
    return {key: count for key, count in found.items() if count > allowed.get(key, 0)}


def token_id_kernels(layers: int) -> int:
    """Counts of token ids: one kernel a step, and three in each micro-batch of the two layers."""
    return 1 + 3 * layers // 2


def test_local_modules(local: tuple[Outcomes, Outcomes]) -> None:
    outcomes = dict(zip(cases.LOCAL, sound(local[0]), strict=True))
    modules = {name: outcome["modules"] for name, outcome in outcomes.items()}
    assert modules["one rank"] == ["CausalAttention", "GroupedExperts"]
    context = modules["capacity, context parallel"]
    assert context == ["ContextParallelAttention", "GroupedExperts"]
    tables = {
        "all-gather": (reads.ALL_GATHER, reads.PERMUTATION),
        "deduplicated": (reads.DEDUPLICATED,),
        "DeepEP": (reads.DEEPEP,),
        "HybridEP": (reads.HYBRIDEP,),
    }
    for name, outcome in outcomes.items():
        if name == "vanilla":
            # megatron-core's own layers, which are not counted.
            continue
        layer = tables.get(name, (reads.ALL_TO_ALL,))
        if "recompute" in name:
            outcome["layers"] *= 2
        assert excess(outcome, layer) == {}, name
    saved = outcomes["guards, health, evaluation, save"]["saved"]
    # Copies of the weights in fp32 and, today, bf16; two moments.
    parameters = outcomes["one rank"]["parameters"]
    assert 12 * parameters <= saved < 14.1 * parameters
    launches = outcomes["one rank"]["launches"]
    layers = outcomes["one rank"]["layers"]
    assert layers == 4
    # Forward and backward of the loss, in each of the two layers' micro-batches.
    for name in ("_reduce_logits", "_write_gradient"):
        assert launches.pop(name) == layers / 2
    # Forward and backward of router, counts by tags, numbering of rows, combine.
    assert launches == dict.fromkeys(launches, layers)
    assert len(launches) == 8
    # What the package starts a layer, next to loss, tags and the step itself; and all of it.
    assert outcomes["one rank"]["owners"]["this package"] <= 74 * layers + token_id_kernels(layers)
    assert outcomes["one rank"]["kernels"] <= 194 * layers + token_id_kernels(layers)


def test_transformer_engine(engine: dict[str, Any]) -> None:
    steps = sound([outcome for outcome, _ in engine["steps"]])
    outcomes = dict(zip(cases.ENGINE, steps, strict=True))
    gathered = outcomes["all-gather"]
    layers = gathered["layers"]
    assert gathered["owners"]["this package"] <= 46 * layers + token_id_kernels(layers)
    tables = {
        "all-gather": (reads.ALL_GATHER, reads.PERMUTATION, reads.FUSED_PERMUTATION),
        "deduplicated": (reads.DEDUPLICATED,),
        "DeepEP, combined schedule": (reads.DEEPEP,),
    }
    (outcomes["DeepEP, combined schedule"],) = sound([engine["layers"][0][0]])
    for name, outcome in outcomes.items():
        assert outcome["modules"] == ["TEDotProductAttention", "TEGroupedMLP"]
        assert excess(outcome, tables.get(name, (reads.ALL_TO_ALL,))) == {}, name


def test_what_would_fail_on_a_gpu_fails_here(local: tuple[Outcomes, Outcomes]) -> None:
    """A tensor that is left on the host, and a read that nobody knows of."""
    on_host, read = local[1]
    assert "found at least two devices, cuda:0 and cpu" in on_host["error"], on_host["error"]
    (new,) = excess(*sound([read]), (reads.ALL_TO_ALL,))
    assert new.startswith("item moepp_megatron/moe/")


def every_shipped() -> Iterator[Any]:
    """Each shipped configuration with the modules that it can run with."""
    for path in (*cases.MODELS, *cases.PLANNED):
        for engine in (False, True):
            if engine or not cases.needs_engine(path):
                modules = "Transformer Engine" if engine else "local modules"
                yield pytest.param(path, engine, id=f"{path.stem}, {modules}")


@pytest.mark.slow
@pytest.mark.parametrize(("path", "engine"), list(every_shipped()))
def test_every_shipped_configuration(play: Play, path: Path, engine: bool) -> None:
    (outcome,) = play([cases.shipped(path)], engine)
    assert outcome["error"] == "", outcome["error"]
    assert outcome["faults"] == []


def test_peak_memory_is_the_planned_one(engine: dict[str, Any]) -> None:
    for outcome, memory in engine["peaks"]:
        sound([outcome])
        assert memory.total == pytest.approx(outcome["peak"], rel=TOLERANCE)


def test_a_layer_keeps_what_is_planned(engine: dict[str, Any]) -> None:
    """What one more layer adds."""
    (few, less), (more, most) = engine["layers"]
    sound([few, more])
    assert most.total - less.total == pytest.approx(more["peak"] - few["peak"], rel=0.03)


@pytest.mark.slow
def test_two_layers_and_a_difference_are_the_whole(play: Play, tmp_path: Path) -> None:
    (path,) = (path for path in cases.PLANNED if path.stem == "moepp_0.6b_8_4_8")
    build.build(tmp_path)
    (outcome,) = sound(play([cases.whole(path)[0]], True))
    assert played_bytes(tmp_path, [path], True)[path] == pytest.approx(outcome["peak"], rel=0.005)


@pytest.mark.slow
def test_peak_memory_of_every_planned_configuration(tmp_path: Path) -> None:
    """The table is in docs/gpu.md."""
    build.build(tmp_path)
    for peak in peaks(tmp_path, cases.PLANNED):
        assert peak.ratio == pytest.approx(1.0, abs=TOLERANCE), peak
        assert peak.fits, peak
