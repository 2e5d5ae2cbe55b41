"""megatron-core's combined schedule with the lane: what it trains equals the ordinary schedules."""

import pytest

from tests.parallel.flex_stand_ins import train_with_deepep, train_with_hybridep
from tests.parallel.forced_routing import only_zero_experts, pad_some, second_half_without_ffn
from tests.parallel.training_runs import EP2, LATENT, PP2, STEPS, assemble, compare, short, train

STAGES = {**PP2, **EP2, "virtual_pipeline_model_parallel_size": 2}


def counted(function, *args):
    """Run `function`; returns its result and how many plans of the combined schedule were made."""
    from moepp_megatron.moe.overlap import MoEPPChunkPlan

    made = []
    original = MoEPPChunkPlan.__init__

    def counting(self, *args, **kwargs):
        made.append(self)
        original(self, *args, **kwargs)

    MoEPPChunkPlan.__init__ = counting  # type: ignore[method-assign]
    try:
        return function(*args), len(made)
    finally:
        MoEPPChunkPlan.__init__ = original  # type: ignore[method-assign]


def both(ranks, world_size, function, prepare=None, **sections):
    """The overlapped run and the ordinary one; virtual stages have four layers and micro-batches.

    Of two micro-batches one's backward pass meets the other's forward pass. Between virtual stages
    the passes of that many would all be warm-up.
    """
    parallel = sections.pop("parallel")
    is_virtual = "virtual_pipeline_model_parallel_size" in parallel
    sections["training"] = {"micro_batch_size": 1, "global_batch_size": 8 if is_virtual else 4}
    sections["precision"] = {"dtype": "bf16"}
    if is_virtual:
        sections["model"] = {"num_layers": 4, **sections.get("model", {})}
    raw = short(parallel=parallel, **sections)
    plain = ranks(world_size).run(function, raw, STEPS, prepare)
    raw["parallel"]["overlap_moe_expert_parallel_comm"] = True
    overlapped = ranks(world_size).run(counted, function, raw, STEPS, prepare)
    assert all(number > 0 for _, number in overlapped), "the combined schedule did not run"
    return assemble([result for result, _ in overlapped]), assemble(plain)


MODELS = {
    "dense layers, shared expert": {
        "model": {"num_layers": 4},
        "moe": {
            "layer_freq": [0, 1, 0, 1],
            "shared_expert_ffn_hidden_size": 16,
            "expert_input_scale": 2.0,
        },
    },
    "no residual": {"moe": {"gating_residual": False}},
    "documents": {"data": {"reset_attention_mask": True}},
    "padding": {"prepare": pad_some},
    "latent attention": {"model": LATENT},
}


@pytest.mark.parametrize("name", MODELS)
def test_without_pipeline(ranks, name):
    compare(*both(ranks, 2, train, **MODELS[name], parallel=EP2), 0.0)


def test_overlapped_reduction_and_gathering(ranks):
    """Parameters are gathered by hooks of the modules, which the nodes must still call."""
    parallel = {**EP2, "overlap_grad_reduce": True, "overlap_param_gather": True}
    compare(*both(ranks, 2, train, model={"num_layers": 3}, parallel=parallel), 0.0)


@pytest.mark.parametrize(
    ("stages", "model"),
    [({}, {}), ({"pipeline_model_parallel_layout": "E|tt|tt|L"}, {}), ({}, LATENT)],
    ids=["even", "embedding and loss alone", "latent attention"],
)
def test_interleaved_pipeline(ranks, stages, model):
    compare(*both(ranks, 4, train, model=model, parallel=STAGES | stages), 0.0)


@pytest.mark.parametrize("prepare", [only_zero_experts, second_half_without_ffn])
def test_ranks_without_ffn_tokens(ranks, prepare):
    moe = {"num_zero_experts": 2}
    compare(*both(ranks, 2, train, prepare, moe=moe, parallel=EP2), 0.0)


@pytest.mark.parametrize("function", [train_with_deepep, train_with_hybridep])
def test_flex(ranks, function):
    compare(*both(ranks, 2, function, moe={"dispatcher": "flex"}, parallel=EP2), 0.0)
