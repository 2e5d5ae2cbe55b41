"""Real traces of gloo ranks: every byte, pass and part is found again, and nothing stays behind."""

import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from moepp_megatron.tools.profiling.analysis import Profile, analyse
from moepp_megatron.tools.profiling.document import document
from moepp_megatron.tools.profiling.measures.purpose import Place, place_of
from moepp_megatron.tools.profiling.trace import Operation
from tests.parallel import forced_routing
from tests.parallel.training_runs import (
    EP2,
    FULL,
    PP2,
    TP2,
    VANILLA,
    SyntheticDataset,
    begin,
    short,
)

pytestmark = pytest.mark.parallel

LAYERS = 2
# Sequences of a step.
BATCH = 4


def record(raw, prepare=None):
    """Train and record some steps; returns losses, and whether all methods are back."""
    import torch.distributed as dist
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from moepp_megatron.features.profile.part import ProfilePart
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.setup import build_training_model
    from moepp_megatron.training.step import training_step
    from moepp_megatron.training.step_sums import mean_loss

    config, layout = begin(raw)
    model = build_training_model(config)
    if prepare is not None:
        prepare(model.models)
        model.optimizer.reload_model_params()
    model.set_training(True)

    def owners():
        layers = [one for chunk in model.models for one in chunk.modules()]
        experts = [one for one in layers if isinstance(one, MoELayer)]
        dispatchers = [one.token_dispatcher for one in experts]
        return [dist.ProcessGroup, dist.Work, model.optimizer, *model.chunks, *layers, *dispatchers]

    def methods():
        return [
            {name: value for name, value in vars(one).items() if callable(value)}
            for one in owners()
        ]

    before = methods()
    recorder = ProfilePart(config, layout, model)
    steps = config.training.train_iters
    batches = rank_batches(SyntheticDataset(config, steps), 0, config, len(model.chunks))
    losses = []
    for step in range(1, steps + 1):
        recorder.begin_step(step, layout)
        result = training_step(model, batches, config, layout)
        recorder.end_step(None)
        losses.append(mean_loss(result.losses))
    recorder.end()
    return losses, methods() == before


def run_settings(folder, **sections):
    """Two steps, of which the second is recorded."""
    training = {"train_iters": 2, "profile_steps": [2], **sections.pop("training", {})}
    return short(run={"dir": str(folder)}, training=training, **sections)


def profile(ranks, folder, prepare=None, **sections):
    results = ranks(2).run(record, run_settings(folder, **sections), prepare)
    assert all(restored for _, restored in results)
    return analyse(folder)


# Several recorded steps and micro-batches, and a step after them, in only the first.
RUNS = {
    "plain": {"training": {"train_iters": 4, "profile_steps": [2, 3], "micro_batch_size": 1}},
    "deduplicated, recomputed": {
        "moe": {"num_ffn_experts": 8, "dispatcher": "alltoall_dedup"},
        "training": FULL,
    },
    "vanilla": {"moe": {"num_ffn_experts": 8, **VANILLA}},
}


@dataclass(frozen=True)
class Recorded:
    """A run's folder, rank 0's losses, and the profile."""

    folder: Path
    losses: list[float]
    profile: Profile


@pytest.fixture(scope="module")
def recorded(ranks, tmp_path_factory):
    """By the name of the run in `RUNS`."""

    @functools.cache
    def run(name):
        folder = tmp_path_factory.mktemp("run")
        results = ranks(2).run(record, run_settings(folder, parallel=EP2, **RUNS[name]))
        assert all(restored for _, restored in results)
        return Recorded(folder, results[0][0], analyse(folder))

    return run


@pytest.mark.parametrize("name", RUNS)
def test_bytes_equal_the_routing_in_every_layer_direction_and_pass(recorded, name):
    found = recorded(name).profile
    phases = ["forward", "backward"] + ["recompute"] * ("recomputed" in name)
    every = {
        Place(layer, part, phase)
        for layer in range(1, LAYERS + 1)
        for part in ("dispatch", "combine")
        for phase in phases
    }
    assert found.steps == RUNS[name].get("training", {}).get("profile_steps", [2])
    for step in found.steps:
        layers = found.layers[step]
        assert {one.place for one in layers} == every
        for one in layers:
            assert one.measured == one.expected, one
            assert 0 < one.deduplicated <= one.ffn_only, one
    moved = [one for step in found.steps for one in found.layers[step]]
    if "deduplicated" in name:
        assert all(one.measured == one.deduplicated for one in moved)
        # Top-2 of four experts per rank: some tokens must have had both on the other one.
        assert sum(one.measured for one in moved) < sum(one.ffn_only for one in moved)


def test_formula_with_an_even_load(ranks, tmp_path):
    """T K phi D b (EP - 1) / EP in numbers that nothing of the profile knows."""
    moe = {"num_ffn_experts": 8, "router_topk": 3}
    found = profile(
        ranks, tmp_path, prepare=forced_routing.one_ffn_expert_of_each_half, moe=moe, parallel=EP2
    )
    tokens, topk, phi, vector = BATCH * 16, 3, 2 / 3, 32 * 4
    expected = tokens * topk * phi * vector * (2 - 1) / 2
    assert [one.measured for one in found.layers[2]] == [expected] * LAYERS * 4
    # The two experts live on two ranks: nothing is sent twice.
    assert all(one.deduplicated == one.measured for one in found.layers[2])
    # Half of the global batch's FFN selections on each rank, in each layer and pass.
    rows = tokens * topk * phi * LAYERS
    assert found.load.busiest_over_mean == 1.0
    assert found.load.rows == {(2, rank): rows / 2 for rank in (0, 1)}


def test_every_call_is_placed_and_matched(recorded):
    found = recorded("plain").profile
    microbatches = 2
    for trace in found.traces:
        span = trace.steps[2]
        calls = [c for c in trace.collectives if span.start_us <= c.start_us < span.end_us]
        exchanges = Counter(
            (place_of(one), one.row_bytes == 32 * 4)
            for one in calls
            if one.operation is Operation.ALL_TO_ALL
        )
        # Rows and gates out, rows back; the gradient of each.
        for layer in range(1, LAYERS + 1):
            for phase in ("forward", "backward"):
                assert exchanges[Place(layer, "dispatch", phase), True] == microbatches
                assert exchanges[Place(layer, "dispatch", phase), False] == microbatches
                assert exchanges[Place(layer, "combine", phase), True] == microbatches
        assert exchanges.total() == 3 * 2 * LAYERS * microbatches
        # All calls of groups with several ranks have a size, and are the same call on both.
        for place, one in enumerate(trace.collectives):
            assert one.size is not None, one
            assert (trace.rank, place) in found.late, one
        assert all(one.end_us > one.start_us for one in trace.collectives)
        # The thread waits only where something is on its way, so the parts do not add up to more.
        time = found.times[2][trace.rank]
        assert 0 < time.exposed_us <= time.communication_us
        assert time.compute_us + time.exposed_us <= time.step_us + 1e-3  # Rounding of a sum.
    purposes = {one.name.purpose for one in found.classes}
    assert {"dispatch", "combine", "gradient reduce", "parameter gather"} <= purposes


def test_pipeline_and_tensor_parallel(ranks, tmp_path):
    pipeline = profile(ranks, tmp_path / "pp", parallel=PP2)
    ends = (Operation.SEND, Operation.RECEIVE)
    sends = [one for one in pipeline.classes if one.name.operation in ends]
    assert {one.name.operation for one in sends} == set(ends)
    assert {one.name.purpose for one in sends} == {"pipeline"}
    assert all(one.matched == one.calls and one.size > 0 for one in sends)
    found = profile(ranks, tmp_path / "tp", parallel=TP2, training={"micro_batch_size": BATCH})
    purposes = {(one.name.purpose, one.name.phase) for one in found.classes}
    assert {("tensor parallel", "forward"), ("tensor parallel", "backward")} <= purposes


def test_some_ranks(ranks, tmp_path):
    """Bytes of one rank are held against its own routing; waiting stays unknown."""
    found = profile(ranks, tmp_path, parallel=EP2, training={"profile_ranks": [1]})
    assert [trace.rank for trace in found.traces] == [1]
    assert all(one.measured == one.expected for one in found.layers[2])
    assert found.critical_rank is None
    assert document(found)["collectives"][0]["wait_ms"] is None


def test_recording_changes_no_loss(ranks, recorded, tmp_path):
    raw = run_settings(tmp_path, parallel=EP2, **RUNS["plain"])
    raw["training"]["profile_steps"] = []
    assert ranks(2).run(record, raw)[0][0] == recorded("plain").losses
    assert {path.name for path in (recorded("plain").folder / "profile").iterdir()} == {
        f"rank{rank}.{ending}" for rank in (0, 1) for ending in ("meta.json", "pt.trace.json.gz")
    }
