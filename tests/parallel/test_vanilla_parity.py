"""Vanilla mode is megatron-core's own MoE model, bit for bit."""

import contextlib

import pytest

from tests.parallel.layouts import OPTIMIZER, RECOMPUTE, VANILLA
from tests.parallel.training_runs import EP2, PP2, STEPS, TP2, SyntheticDataset, begin, short, train


def upstream_model(config):
    """This rank's chunks of megatron-core's model, with the weights of ours."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from moepp_megatron.model.build import build_model
    from moepp_megatron.model.megatron_config import transformer_config

    chunks = []
    ours = build_model(config)
    for index, model in enumerate(ours):
        vp_stage = index if len(ours) > 1 else None
        megatron = transformer_config(config)
        with _norms_with_sequence_parallelism(megatron.sequence_parallel):
            spec = get_gpt_decoder_block_spec(
                megatron,
                use_transformer_engine=False,
                normalization=megatron.normalization,
                vp_stage=vp_stage,
            )
            place = {"ignore_virtual": False, "vp_stage": vp_stage}
            upstream = GPTModel(
                megatron,
                spec,
                vocab_size=config.model.vocab_size,
                max_sequence_length=config.model.seq_length,
                pre_process=parallel_state.is_pipeline_first_stage(**place),
                post_process=parallel_state.is_pipeline_last_stage(**place),
                share_embeddings_and_output_weights=config.model.tie_embeddings,
                position_embedding_type="rope",
                rotary_base=config.model.rotary_base,
                vp_stage=vp_stage,
            )
        modules = {type(module).__module__ for module in upstream.modules()}
        if not megatron.sequence_parallel:
            assert not any(name.startswith("moepp") for name in modules)
        upstream.load_state_dict(model.state_dict(), strict=True)
        chunks.append(upstream.to(torch.cuda.current_device()))
    return chunks


@contextlib.contextmanager
def _norms_with_sequence_parallelism(needed):
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from moepp_megatron.model.local_modules import _SequenceParallelRMSNorm

    original = WrappedTorchNorm.__new__

    def build(cls, config, hidden_size, eps=1e-5, **unused):
        return _SequenceParallelRMSNorm(config, hidden_size, eps)

    if needed:
        WrappedTorchNorm.__new__ = build
    try:
        yield
    finally:
        WrappedTorchNorm.__new__ = original


def train_upstream(raw):
    """Losses and gradient norms of megatron-core's model."""
    from moepp_megatron.training import setup
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.step import training_step
    from moepp_megatron.training.step_sums import mean_loss

    config, layout = begin(raw)
    original, setup.build_model = setup.build_model, upstream_model
    try:
        model = setup.build_training_model(config)
    finally:
        setup.build_model = original
    model.set_training(True)
    batches = rank_batches(SyntheticDataset(config, STEPS), 0, config, len(model.chunks))
    results = [training_step(model, batches, config, layout) for _ in range(STEPS)]
    return [mean_loss(r.losses) for r in results], [r.grad_norm for r in results]


LAYOUTS = {
    "dp2 overlapped": (2, {"parallel": OPTIMIZER["overlap both"]}),
    "ep2 allgather": (2, {"parallel": EP2, "moe": {"dispatcher": "allgather"}}),
    "ep2 etp2": (
        4,
        {
            "parallel": {**EP2, "expert_tensor_parallel_size": 2},
            "training": {"micro_batch_size": 1},
        },
    ),
    "tp2 ep2": (2, {"parallel": TP2 | EP2}),
    "pp2 ep2 bf16": (
        4,
        {
            "parallel": PP2 | EP2,
            "precision": {"dtype": "bf16"},
            # Two of them go through the stages.
            "training": {"micro_batch_size": 1},
        },
    ),
    "pp2 interleaved recompute": (
        2,
        {
            "model": {"num_layers": 4},
            "parallel": {**PP2, "virtual_pipeline_model_parallel_size": 2},
            "training": RECOMPUTE["uniform"],
        },
    ),
    "pp2 dense layers tied": (
        2,
        {"parallel": PP2, "moe": {"layer_freq": [0, 1]}, "model": {"tie_embeddings": True}},
    ),
    "selected gates per sequence": (
        1,
        {"moe": {"gate_normalization": "selected", "balance_scope": "sequence"}},
    ),
    "z loss and capacity": (1, {"moe": {"z_loss_coeff": 0.01, "capacity_factor": 1.0}}),
    # The plainest run but for this.
    "shared expert": (1, {"moe": {"shared_expert_ffn_hidden_size": 16}}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_megatron_core(ranks, layout):
    world_size, sections = LAYOUTS[layout]
    raw = short(**{**sections, "moe": {**VANILLA, **sections.get("moe", {})}})
    run, _ = ranks(world_size).run(train, raw, STEPS)[0]
    losses, grad_norms = ranks(world_size).run(train_upstream, raw)[0]
    assert run.losses == losses
    assert run.grad_norms == grad_norms
