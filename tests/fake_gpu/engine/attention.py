"""Attention and rotations of Transformer Engine's extension: shapes, and what cuDNN asks."""

import torch

from tests.fake_gpu.engine.functions import HOST, function, new


@function
def get_fused_attn_backend(fused_attn_params=None):
    import transformer_engine_torch as extension

    backend = extension.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen
    # Older versions have each setting as an argument, and no reason in the answer.
    return backend if fused_attn_params is None else (backend, "")


HOST.add("get_fused_attn_backend")


@function
def fused_attn_fwd(
    max_seqlen_q,
    cu_seqlens_q,
    cu_seqlens_kv,
    Q,
    K,
    V,
    fake_dtype,
):
    _check_attention(cu_seqlens_q, cu_seqlens_kv, Q, K, V)
    output = new([*Q.shape[:-1], V.shape[-1]], fake_dtype)
    sequences = cu_seqlens_q.shape[0] - 1
    statistics = new([sequences, Q.shape[-2], max_seqlen_q, 1], torch.float32)
    return [output, statistics, new([2], torch.int64)]


def _check_attention(cu_seqlens_q, cu_seqlens_kv, *layers):
    for lengths in (cu_seqlens_q, cu_seqlens_kv):
        assert lengths.dtype == torch.int32, f"sequence lengths in {lengths.dtype}"
    query, key, value = layers
    assert query.dtype in (torch.float16, torch.bfloat16), f"attention in {query.dtype}"
    assert query.shape[-1] == key.shape[-1], "channels of queries and keys differ"
    assert key.shape[:-1] == value.shape[:-1], "keys and values differ"
    assert query.shape[-2] % key.shape[-2] == 0, "queries are no multiple of the groups"
    assert query.shape[-1] % 8 == 0, "cuDNN needs a multiple of 8 channels"


@function
def fused_attn_bwd(
    cu_seqlens_q,
    cu_seqlens_kv,
    Q,
    K,
    V,
    O,  # noqa: E741
    dO,
    fake_dtype,
    dqkv_layout=None,
    qkv_layout=None,
):
    _check_attention(cu_seqlens_q, cu_seqlens_kv, Q, K, V)
    assert O.numel() == dO.numel()
    # Older versions give gradients the layout of their tensors.
    layout = qkv_layout if dqkv_layout is None else dqkv_layout
    name, rest = layout.name, [None, None]
    if "3HD" in name or "H3D" in name:
        axis = -3 if "3HD" in name else -2
        shape = list(Q.shape)
        shape.insert(len(shape) + 1 + axis, 3)
        whole = new(shape, fake_dtype)
        return [whole.select(axis, number) for number in range(3)] + rest
    return [new(each.shape, fake_dtype) for each in (Q, K, V)] + rest


@function
def fused_rope_forward(input):
    return new(input.shape, input.dtype)


@function
def fused_rope_backward(output_grads):
    return new(output_grads.shape, output_grads.dtype)


@function
def fused_qkv_rope_forward(qkv_input, q_freqs, k_freqs, qkv_split_arg_list):
    for freqs in (q_freqs, k_freqs):
        assert freqs.dtype == torch.float32, f"frequencies in {freqs.dtype}"
        assert tuple(freqs.shape[1:3]) == (1, 1), tuple(freqs.shape)
    assert qkv_input.dim() == 4, tuple(qkv_input.shape)
    assert qkv_input.is_contiguous()
    *outer, groups, _ = qkv_input.shape
    of_query, width, of_value = qkv_split_arg_list
    query = new([*outer, groups * of_query // width, width], qkv_input.dtype)
    sizes = ([*outer, groups, each] for each in (width, of_value))
    return query, *(new(size, qkv_input.dtype) for size in sizes)


@function
def fused_qkv_rope_backward(q_grad_out, k_grad_out, v_grad_out, qkv_split_arg_list):
    heads = sum(each.shape[2] for each in (q_grad_out, k_grad_out, v_grad_out))
    total = sum(qkv_split_arg_list)
    groups = heads * q_grad_out.shape[3] // total
    return new([*q_grad_out.shape[:2], groups, total], q_grad_out.dtype)
