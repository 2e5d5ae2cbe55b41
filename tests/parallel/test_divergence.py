"""Copies of a parameter that come apart are found, and named with rank and step."""

import pytest

from tests.parallel.training_runs import CP2, EP2, PP2, TP2, SyntheticDataset, begin_training, short

pytestmark = pytest.mark.parallel

TIED = {"tie_embeddings": True}
LATE = {"overlap_grad_reduce": True, "overlap_param_gather": True}
# Layout; parts of parameters' names on rank 1 (with PP2 a last stage) whose copies are on rank 0,
# and on rank 3 those of an expert of two times two expert-parallel ranks.
CASES = {
    "dense weights and experts over dp": (
        {},
        ("linear_qkv.weight", "local_experts.3.linear_fc1.weight"),
    ),
    "router over dp, with ep": ({"parallel": EP2}, ("router.weight",)),
    "what is whole over tp": (
        {"parallel": TP2},
        ("input_layernorm.weight", "router.residual_weight", "zero_computation"),
    ),
    "an expert's copies alone": (
        {"parallel": EP2, "training": {"micro_batch_size": 1}},
        ("local_experts.3.linear_fc1.weight",),
    ),
    "weight shard over cp": ({"parallel": CP2}, ("self_attention.linear_proj.weight",)),
    "tied embedding over pp": ({"parallel": PP2, "model": TIED}, ("output_layer.weight",)),
    # Not while they are gathered late, and in 16 bits.
    "none, bf16": ({"precision": {"dtype": "bf16"}}, ()),
    "none, late gather": ({"parallel": LATE}, ()),
}


def train_and_flip(raw, parts):
    """Compare after each of two steps; then again and again with one bit flipped on rank 1."""
    import torch.distributed as dist

    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.resilience.supervisor import SilentDivergenceError, Supervisor
    from moepp_megatron.training.step import training_step

    config, layout, model = begin_training(raw)
    supervisor = Supervisor(config, model)
    batches = rank_batches(SyntheticDataset(config, 2), 0, config, len(model.chunks))
    for step in (1, 2):
        training_step(model, batches, config, layout)
        supervisor.end_step(step)
    found = []
    for part in parts:
        name = _flip_one_bit(model.models[0], part) if dist.get_rank() == 1 else ""
        with pytest.raises(SilentDivergenceError) as caught:
            supervisor.end_step(2)
        found.append((name, str(caught.value)))
        if dist.get_rank() == 1:
            _flip_one_bit(model.models[0], part)
    supervisor.end_step(2)
    return found


def _flip_one_bit(model, part):
    import torch

    names = [name for name, _ in model.named_parameters() if part in name]
    assert names, f"no parameter named like {part}"
    parameter = model.get_parameter(names[-1])
    # The lowest bit of the mantissa, of an element in the middle.
    words = parameter.data.view(-1).view(torch.int32)
    words[words.numel() // 2] ^= 1
    return names[-1]


@pytest.mark.parametrize("case", CASES)
def test_one_flipped_bit_ends_every_rank(ranks, case):
    """Healthy copies agree before and after; a rank that saw no difference would not return."""
    sections, parts = CASES[case]
    watch = {"divergence_interval": 1, "hang_timeout_s": 0.0, "straggler_interval": 0}
    raw = short(**sections, resilience=watch)
    size, other = (4, 3) if "training" in sections else (2, 0)
    for found in ranks(size).run(train_and_flip, raw, parts):
        assert len(found) == len(parts)
        for part, (_, message) in zip(parts, found, strict=True):
            lines = [line for line in message.splitlines() if line.startswith("  step 2: ")]
            assert len(lines) == 1, f"one parameter was changed: {lines}"
            assert part in lines[0] or "tied embedding" in lines[0]
            assert f"rank {other} " in lines[0]
            assert "rank 1 " in lines[0]
