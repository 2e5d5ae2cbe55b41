"""Steps with Transformer Engine's own Python: every feature of it that a configuration can name."""

import pytest

from tests.fake_gpu import cases, reads
from tests.fake_gpu.drawn import drawn
from tests.fake_gpu.engine.declarations import REQUIRED, functions
from tests.fake_gpu.outcomes import excess, sound, token_id_kernels
from tests.fake_gpu.peaks import launches
from tests.fake_gpu.real_packages import Unavailable, transformer_engine

pytestmark = pytest.mark.timeout(900)


# The rest of the cases with the slow tests.
IS_COVERED = pytest.mark.parametrize(
    "is_covered", [False, pytest.param(True, marks=pytest.mark.slow)]
)


def played(play, cases_by_name, is_covered, *args, **kwargs):
    """Outcomes by name, of those that others cover or of the others, with no read that is new."""
    names = [name for name in cases_by_name if (name in cases.COVERED) == is_covered]
    steps = sound(play([cases_by_name[name] for name in names], *args, **kwargs))
    outcomes = dict(zip(names, steps, strict=True))
    for name, outcome in outcomes.items():
        if "recompute" in name and name != "recompute core_attn":
            # More than is asked for; what one recomputes is not what another does.
            outcome["layers"] *= 2
        tables = reads.of_overrides(cases_by_name[name]["overrides"])
        assert excess(outcome, tables) == {}, name
    return outcomes


@IS_COVERED
def test_features(play, transformer_engine, is_covered):
    outcomes = played(play, cases.ENGINE, is_covered, transformer_engine)
    for name, outcome in outcomes.items():
        experts = "EngineExperts" if "static rows" in name else "TEGroupedMLP"
        assert experts in outcome["modules"]
    if is_covered:
        return
    # Attention, router and experts of two layers, forward and backward.
    assert outcomes["static rows, graphs"]["launches"]["a graph"] == 2 * 3 * 2
    layers = outcomes["all-gather"]["layers"]
    launches = outcomes["all-gather"]["owners"]["this package"]
    assert launches <= 46 * layers + token_id_kernels(layers)
    # What megatron-core's own settings are for: fewer kernels a layer, and memory.
    fewer = {"fused residual": 1, "fused rotation": 4}
    for name, kernels in fewer.items():
        assert outcomes["one rank"]["kernels"] - outcomes[name]["kernels"] == 4 * kernels, name
    fused = outcomes["vanilla, fused router"]["kernels"]
    assert outcomes["vanilla"]["kernels"] - fused == 2 * 17
    assert outcomes["offloading"]["peak"] < outcomes["one rank"]["peak"]


@IS_COVERED
def test_mxfp8_on_a_blackwell_gpu(play, transformer_engine, is_covered):
    played(play, cases.MXFP8, is_covered, transformer_engine, capability=10)


def every_shipped():
    """Each shipped configuration with the modules that it can run with."""
    for path in (*cases.MODELS, *cases.PLANNED):
        for engine in (False, True):
            if engine or not cases.needs_engine(path):
                modules = "Transformer Engine" if engine else "local modules"
                yield pytest.param(path, engine, id=f"{path.stem}, {modules}")


@pytest.mark.slow
@pytest.mark.parametrize(("path", "engine"), list(every_shipped()))
def test_every_shipped_configuration(play, path, engine, request):
    package = request.getfixturevalue("transformer_engine") if engine else None
    (outcome,) = play([cases.shipped(path)], package)
    assert outcome["error"] == "", outcome["error"]
    assert outcome["faults"] == []


# Kernels of a layer and micro-batch, a grouped product counted once: of MoE++ and of vanilla.
LAUNCHES = {"moepp_0.6b_8_4": (105, 107), "moepp_7b_16_4": (116, 113)}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHES)
def test_the_planner_counts_the_launches(stub, transformer_engine, name):
    """Static rows too; vanilla counts are those of published runs, MoE++ has as many more."""
    path = cases.ROOT / f"configs/models/{name}.yaml"
    played, planned = [], []
    for changes in ((), cases.VANILLA, ("moe.static_rows=1.25",)):
        found = launches(stub, path, transformer_engine, *changes)
        print(name, *changes, found)
        played.append(sum(found.values()))
        planned.append(cases.planned_launches(path, *changes))
    assert played[0] <= LAUNCHES[name][0]
    assert played[1] <= LAUNCHES[name][1]
    assert planned[0] - planned[1] == pytest.approx(played[0] - played[1], abs=1)
    # The planner counts six products for each expert without static rows, and six with them.
    more = planned[2] - planned[0] + 6 * (cases.experts_of_a_rank(path) - 1)
    assert more == pytest.approx(played[2] - played[0], abs=2)


def test_arguments_that_pybind_does_not_name(transformer_engine):
    """As the compiled extension shows them: `fused_rope_backward(arg0: object, ...)`."""
    found = functions(transformer_engine.source)
    assert {(each.named, each.default) for each in found["fused_rope_backward"]} == {
        (False, REQUIRED)
    }
    assert all(each.named for each in found["fp8_transpose"])


# Seeds 0 to 65; some of them are for another machine. The first few run by default.
DRAWN, FEW = 66, 6


def _no_drawn_one_fails(play, engine, seeds):
    """Play what the seeds draw; how many were played."""
    chosen = [drawn(seed) for seed in seeds]
    count = 0
    for case, outcome in zip(chosen, play(chosen, engine), strict=True):
        assert outcome["error"] == "", f"{case}\n{outcome['error']}"
        assert outcome["faults"] == [], case
        outcome["layers"] *= 2 if "recompute" in "".join(case["overrides"]) else 1
        assert excess(outcome, reads.of_overrides(case["overrides"])) == {}, case
        count += outcome["refused"] == ""
    return count


def test_drawn_configurations(play, transformer_engine):
    assert _no_drawn_one_fails(play, transformer_engine, range(FEW)) > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sixty_drawn_configurations(play, transformer_engine):
    parts = [range(first, first + 22) for first in range(0, DRAWN, 22)]
    assert sum(_no_drawn_one_fails(play, transformer_engine, part) for part in parts) >= 60


# The oldest that is played, whose recomputation megatron-core's `layernorm` and `moe_act` need.
OLDEST = "2.6.0.post1"


def test_the_oldest_version(play):
    names = ["one rank", "FP8, blockwise, expert parallel", "FP8, delayed, weights", "graphs"]
    try:
        engine = transformer_engine(OLDEST)
    except Unavailable as error:
        pytest.skip(str(error))
    for outcome in sound(play([cases.ENGINE[name] for name in names], engine)):
        assert outcome["modules"] == ["TEDotProductAttention", "TEGroupedMLP"]
