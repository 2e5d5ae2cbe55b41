"""A checkpoint of any layout resumes in any other as if nothing had happened."""

import numpy as np
import pytest

from tests.parallel.checkpoint_runs import train_between
from tests.parallel.training_runs import CP2, EP2, PP2, TP2, settings

# As between layouts without a checkpoint (test_matrix.py): sums in another order, a few units in
# the last place (6e-8) each, carried on by six steps of Adam.
FP32 = 1e-5
STEPS, CHANGE_AT = 4, 2

WHOLE = {"use_distributed_optimizer": False}
ETP2 = {"expert_tensor_parallel_size": 2}
LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "dp2 whole optimizer": (2, WHOLE),
    "dp2 overlapped": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "ep2": (2, EP2),
    "ep2 whole optimizer": (2, EP2 | WHOLE),
    "tp2": (2, TP2),
    "etp2": (2, ETP2),
    "cp2": (2, CP2),
    "pp2": (2, PP2),
    "pp2 interleaved": (2, PP2 | {"virtual_pipeline_model_parallel_size": 2}),
    "pp2 uneven": (2, PP2 | {"pipeline_model_parallel_layout": "Et|tttL"}),
    "ep4": (4, {"expert_model_parallel_size": 4}),
    "tp2 pp2 ep2": (4, TP2 | PP2 | EP2),
    "tp2 etp2 ep2": (4, TP2 | EP2 | ETP2),
    "pp2 ep2 ends apart": (4, PP2 | EP2 | {"pipeline_model_parallel_layout": "Etttt|L"}),
    "cp2 pp2 ep2 whole optimizer": (4, PP2 | EP2 | CP2 | WHOLE),
}
PAIRS = [
    ("one", "ep2"),
    ("tp2", "pp2 interleaved"),
    ("ep2", "dp2 whole optimizer"),
    ("dp2 whole optimizer", "tp2"),
]
MORE_PAIRS = [
    ("ep2", "one"),
    ("dp2", "dp2 whole optimizer"),
    ("dp2 overlapped", "ep2"),
    ("ep2 whole optimizer", "dp2 overlapped"),
    ("pp2 interleaved", "ep2"),
    ("pp2", "pp2 uneven"),
    ("pp2 uneven", "cp2"),
    ("cp2", "etp2"),
    ("etp2", "ep2"),
    ("ep2", "ep4"),
    ("ep4", "tp2 pp2 ep2"),
    ("tp2 pp2 ep2", "one"),
    ("one", "tp2 etp2 ep2"),
    ("tp2 etp2 ep2", "cp2 pp2 ep2 whole optimizer"),
    ("cp2 pp2 ep2 whole optimizer", "tp2"),
    # The last stage has no layer, and so no experts.
    ("ep2", "pp2 ep2 ends apart"),
    ("pp2 ep2 ends apart", "ep2"),
]


def run_settings(**sections):
    """Four layers, for pipelines; micro-batches, which have balance losses, as four ranks need."""
    model = {"num_layers": 4, **sections.pop("model", {})}
    training = {"global_batch_size": 4, "micro_batch_size": 1}
    return settings(model=model, training=training, **sections)


def check(ranks, folder, writer, reader, **sections):
    """Losses of a run that changes its layout in the middle."""
    world_size, parallel = LAYOUTS[writer]
    raw = run_settings(parallel=parallel, **sections)
    losses = ranks(world_size).run(train_between, raw, folder, CHANGE_AT)[0]
    world_size, parallel = LAYOUTS[reader]
    raw = run_settings(parallel=parallel, **sections)
    start = folder / f"step_{CHANGE_AT:08d}"
    rest = ranks(world_size).run(train_between, raw, folder, STEPS, start)[0]
    return losses + rest


@pytest.mark.parametrize(
    ("writer", "reader"),
    [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.matrix) for pair in MORE_PAIRS)],
)
def test_run_continues_in_another_layout(ranks, alone, tmp_path, writer, reader):
    losses = check(ranks, tmp_path, writer, reader)
    np.testing.assert_allclose(losses, alone(run_settings(), steps=STEPS).losses, rtol=FP32)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "sections",
    [{"model": {"tie_embeddings": True}}, {"moe": {"num_ffn_experts": 8, "layer_freq": 2}}],
    ids=["tied", "mixed"],
)
def test_other_models(ranks, alone, tmp_path, sections):
    losses = check(ranks, tmp_path, "pp2", "ep2", **sections)
    expected = alone(run_settings(**sections), steps=STEPS).losses
    np.testing.assert_allclose(losses, expected, rtol=FP32)


@pytest.mark.parametrize(
    ("writer", "reader"), [("dp2", "dp2 whole optimizer"), ("dp2 whole optimizer", "dp2")]
)
def test_fp32_copies_of_bf16_parameters_are_the_same_for_either_optimizer(
    ranks, tmp_path, writer, reader
):
    # The same ranks add the same gradients in the same order, so nothing may differ but what a
    # lost fp32 copy would change (bf16 keeps 8 bits: 4e-3).
    sections = {"model": {"num_layers": 2}, "precision": {"dtype": "bf16"}}
    losses = check(ranks, tmp_path, writer, reader, **sections)
    world_size, parallel = LAYOUTS[writer]
    raw = run_settings(parallel=parallel, **sections)
    expected = ranks(world_size).run(train_between, raw, tmp_path / "whole", STEPS)[0]
    np.testing.assert_allclose(losses, expected, rtol=FP32)
