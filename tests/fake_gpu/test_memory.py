"""The planner's memory against the bytes of tensors in steps with Transformer Engine."""

import pytest

from tests.fake_gpu import cases, reads
from tests.fake_gpu.outcomes import excess, sound
from tests.fake_gpu.peaks import peaks, played_bytes

pytestmark = pytest.mark.timeout(900)

# Of an estimate of memory. What is played is exact for the modules that it plays.
TOLERANCE = 0.15
SMALL = cases.ROOT / cases.SMALLEST


@pytest.fixture(scope="module")
def engine(play, transformer_engine):
    """Outcomes, each with its planned memory."""
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
        "static rows": [
            cases.whole(SMALL, "moe.static_rows=1.6", *changes[1:], f"model.num_layers={n}")
            for n in (2, 3)
        ],
    }
    played = iter(play([case for each in wanted.values() for case, _ in each], transformer_engine))
    return {name: [(next(played), plan) for _, plan in each] for name, each in wanted.items()}


def test_peak_memory_is_the_planned_one(engine):
    for outcome, memory in engine["peaks"]:
        sound([outcome])
        assert memory.total == pytest.approx(outcome["peak"], rel=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "tables"), [("layers", (reads.DEEPEP,)), ("static rows", ())], ids=str
)
def test_a_layer_keeps_what_is_planned(engine, name, tables):
    """One more layer adds what the planner says."""
    (few, less), (more, most) = engine[name]
    sound([few, more])
    assert excess(few, tables) == {}
    assert most.total - less.total == pytest.approx(more["peak"] - few["peak"], rel=0.03)


@pytest.mark.slow
def test_two_layers_and_a_difference_are_the_whole(play, stub, transformer_engine):
    (path,) = (path for path in cases.PLANNED if path.stem == "moepp_0.6b_8_4_8")
    (outcome,) = sound(play([cases.whole(path)[0]], transformer_engine))
    played = played_bytes(stub, [path], transformer_engine)
    assert played[path] == pytest.approx(outcome["peak"], rel=0.005)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_peak_memory_of_every_planned_configuration(stub, transformer_engine):
    """The table is in docs/gpu.md."""
    for peak in peaks(stub, cases.PLANNED):
        print(peak.row())
        assert peak.ratio == pytest.approx(1.0, abs=TOLERANCE), peak
        assert peak.fits, peak
