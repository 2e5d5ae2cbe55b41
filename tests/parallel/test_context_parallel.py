"""Context parallelism without Transformer Engine: attention, rotary angles, batches, training."""

from itertools import permutations

import pytest

from tests.parallel.training_runs import begin, settings

# Two orders of summation of the same fp32 terms: some hundred roundings of 2^-24 each.
FP32_TOLERANCE = 1e-5
SEQUENCE = 32
MODEL = {"hidden_size": 64, "num_query_groups": 2, "seq_length": SEQUENCE}


# ---- functions that run on the ranks -----------------------------------------------------


def attention_config(cp, query_groups, dtype="float32", **changes):
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = {
        "num_layers": 1,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_query_groups": query_groups,
        "context_parallel_size": cp,
        "attention_dropout": 0.0,
        "masked_softmax_fusion": False,
        "params_dtype": getattr(torch, dtype),
        "bf16": dtype == "bfloat16",
    }
    return TransformerConfig(**(settings | changes))


def core_attention(module, config, **changes):
    from megatron.core.transformer.enums import AttnMaskType

    settings = {
        "config": config,
        "layer_number": 1,
        "attn_mask_type": AttnMaskType.causal,
        "attention_type": "self",
        "cp_comm_type": None,
        "softmax_scale": None,
        "pg_collection": None,
    }
    return module(**(settings | changes))


def own_part(tensor, cp, rank):
    """The two zigzag chunks of [s, ...], written down independently of the code under test."""
    import torch

    length = tensor.shape[0] // (2 * cp)
    early, late = rank * length, (2 * cp - 1 - rank) * length
    return torch.cat([tensor[early : early + length], tensor[late : late + length]])


def output_and_gradients(attention, inputs, weight, dtype):
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs]
    output = attention(*leaves, None)
    (output.float() * weight).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def attention_errors(cp, cases):
    """`_attention_errors` of each case (query groups, sequences, dtype)."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(context_parallel_size=cp)
    model_parallel_cuda_manual_seed(1)
    return [_attention_errors(cp, *case) for case in cases]


def _attention_errors(cp, query_groups, batch, dtype):
    """Output and gradients of q, k, v: distance to fp32 attention on one process."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from moepp_megatron.model.attention import ContextParallelAttention

    rank = parallel_state.get_context_parallel_rank()
    generator = torch.Generator().manual_seed(3)
    shapes = [(SEQUENCE, batch, heads, 8) for heads in (6, query_groups, query_groups)]
    low = getattr(torch, dtype)
    # Rounded first: both precisions see the same numbers.
    inputs = [torch.randn(shape, generator=generator).to(low).float() for shape in shapes]
    weight = torch.randn(SEQUENCE, batch, 48, generator=generator).to(low).float()

    exact_module = core_attention(DotProductAttention, attention_config(1, query_groups))
    exact = output_and_gradients(exact_module, inputs, weight, torch.float32)
    whole_module = core_attention(DotProductAttention, attention_config(1, query_groups, dtype))
    whole = output_and_gradients(whole_module, inputs, weight, low)
    module = core_attention(ContextParallelAttention, attention_config(cp, query_groups, dtype))
    parts = [own_part(tensor, cp, rank) for tensor in inputs]
    split = output_and_gradients(module, parts, own_part(weight, cp, rank), low)
    assert all(tensor.dtype is low for tensor in split)

    def error(tensor, reference):
        part = own_part(reference, cp, rank)
        assert tensor.shape == part.shape
        difference = tensor.float() - part
        return (
            (difference.abs().max() / reference.abs().max()).item(),
            (difference.norm() / part.norm()).item(),
        )

    return {
        "split": [error(*pair) for pair in zip(split, exact, strict=True)],
        "whole": [error(own_part(t, cp, rank), e) for t, e in zip(whole, exact, strict=True)],
    }


def summed_gradients():
    """Return the sum of four ranks' gradients of one tensor: 256 + 1 - 256 + 1 in any order.

    bf16 loses a 1 next to 256, so no order of adding in bf16 gives 2 for every permutation.
    """
    import torch
    from megatron.core import parallel_state

    from moepp_megatron.model.attention import _GatherSequence

    parallel_state.initialize_model_parallel(context_parallel_size=4)
    group = parallel_state.get_context_parallel_group()
    orders = sorted(set(permutations((256.0, 1.0, -256.0, 1.0))))
    local = torch.zeros(2, 1, 1, len(orders), dtype=torch.bfloat16, requires_grad=True)
    gathered = _GatherSequence.apply(local, group)
    terms = torch.tensor([order[group.rank()] for order in orders], dtype=torch.bfloat16)
    gathered.backward(terms.expand_as(gathered))
    return local.grad.float().unique().tolist()


def refusal(tokens, given, **changes):
    """Of a module made with `changes`, and called with so many tokens and `given` besides."""
    import torch
    from megatron.core import parallel_state

    from moepp_megatron.model.attention import ContextParallelAttention

    parallel_state.initialize_model_parallel(context_parallel_size=2)
    arguments = {key: changes.pop(key) for key in ("cp_comm_type",) if key in changes}

    def attention():
        config = attention_config(2, 6, **changes)
        module = core_attention(ContextParallelAttention, config, **arguments)
        module(*[torch.zeros(tokens, 1, 6, 8)] * 3, **({"attention_mask": None} | given))

    with pytest.raises(ValueError, match="must be") as caught:
        attention()
    return str(caught.value)


def rotary_positions(cp):
    """Largest difference between this rank's rotary angles and those of its tokens' positions."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    parallel_state.initialize_model_parallel(context_parallel_size=cp)
    rotary = RotaryEmbedding(8, 1.0, use_cpu_initialization=True)
    angles = rotary(SEQUENCE)[:, 0, 0, :4]
    positions = own_part(torch.arange(SEQUENCE), cp, parallel_state.get_context_parallel_rank())
    expected = positions[:, None] / 10000 ** (torch.arange(4) / 4)
    return (angles - expected).abs().max().item()


class NumberedSamples:
    """Sample i holds the numbers from i * SEQUENCE on: they tell sample and position."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        import torch

        numbers = torch.arange(SEQUENCE) + index * SEQUENCE
        return {"tokens": numbers, "loss_mask": numbers.float()}


def batches_read(parallel):
    """Data-parallel rank, context-parallel rank and the micro-batches of one step."""
    from itertools import islice

    from megatron.core import parallel_state

    from moepp_megatron.training.batches import rank_batches

    # Every number is a token.
    model = MODEL | {"vocab_size": len(NumberedSamples()) * SEQUENCE}
    config, layout = begin(settings(model=model, parallel=parallel))
    (batches,) = rank_batches(NumberedSamples(), 0, config, 1)
    read = [
        {key: value.tolist() for key, value in batch.items()}
        for batch in islice(batches, layout.num_microbatches)
    ]
    dp = parallel_state.get_data_parallel_rank()
    return dp, parallel_state.get_context_parallel_rank(), read


# ---- tests -------------------------------------------------------------------------------


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_attention_equals_one_process(ranks, cp):
    # Heads of their own for keys, and shared ones; one sequence, and several.
    cases = [(groups, batch, "float32") for groups in (6, 2) for batch in (1, 3)]
    for errors_of_rank in ranks(cp).run(attention_errors, cp, cases):
        for case, errors in zip(cases, errors_of_rank, strict=True):
            assert max(largest for largest, _ in errors["split"]) < FP32_TOLERANCE, case


@pytest.mark.parametrize("cp", [2, 4])
def test_attention_in_bf16_is_as_exact_as_one_process(ranks, cp):
    cases = [(6, 3, "bfloat16"), (2, 3, "bfloat16")]
    for errors in sum(ranks(cp).run(attention_errors, cp, cases), []):
        for (largest, mean), (_, whole_mean) in zip(errors["split"], errors["whole"], strict=True):
            # bf16 rounds by up to 2^-8: once the result, once the factors of the sums behind it.
            assert largest < 2 * 2**-8
            # Each rank's share of a gradient of k or v is rounded before the shares are added in
            # fp32: one independent rounding of the result's size more than on one process, which
            # at least rounds the result. Two independent ones are sqrt(2) of one.
            assert mean < 2**0.5 * whole_mean


def test_gradients_are_added_in_fp32(ranks):
    assert ranks(4).run(summed_gradients) == [[2.0]] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_dropout": 0.1}, r"attention_dropout (0.1) must be 0.0 with"),
        ({"cp_comm_type": "p2p"}, "cp_comm_type (p2p) must be None or all_gather with"),
        ({"window_size": (4, 0)}, "window_size ((4, 0)) must be None with"),
        ({"softmax_type": "off-by-one"}, "softmax_type (off-by-one) must be vanilla with"),
    ],
)
def test_settings_that_would_change_the_result_are_refused(ranks, changes, message):
    for text in ranks(2).run(refusal, 4, {}, **changes):
        assert text.startswith(message)
        assert "or Transformer Engine" in text


def test_masks_and_odd_lengths_are_refused(ranks):
    for text in ranks(2).run(refusal, 4, {"attention_bias": "bias"}):
        assert text.startswith("attention_bias (str) must be None")
    for text in ranks(2).run(refusal, 3, {}):
        assert text.startswith("sequence length of a context-parallel rank (3) must be divisible")


@pytest.mark.parametrize("cp", [2, 4])
def test_rotary_angles_are_those_of_the_ranks_positions(ranks, cp):
    assert max(ranks(cp).run(rotary_positions, cp)) < 1e-6


@pytest.mark.parametrize("cp", [1, 2])
def test_ranks_read_their_samples_and_their_chunks_of_them(ranks, cp):
    dp, micro_batch = 2, 2
    chunk = SEQUENCE // (2 * cp)
    for dp_rank, cp_rank, read in ranks(dp * cp).run(batches_read, {"context_parallel_size": cp}):
        starts = (cp_rank * chunk, (2 * cp - 1 - cp_rank) * chunk)
        positions = [start + offset for start in starts for offset in range(chunk)]
        assert len(read) == len(NumberedSamples()) // (dp * micro_batch)
        for number, batch in enumerate(read):
            first = (number * dp + dp_rank) * micro_batch
            numbers = [
                [sample * SEQUENCE + position for position in positions]
                for sample in range(first, first + micro_batch)
            ]
            assert batch == {"tokens": numbers, "loss_mask": numbers}
