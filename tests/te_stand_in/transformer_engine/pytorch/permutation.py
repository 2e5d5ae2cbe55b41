"""Permutation of rows by a routing map, with Transformer Engine's answers where there are none."""

import torch


def moe_permute(inp, routing_map, num_out_tokens, max_token_num=-1, map_type="mask"):
    rows, _, row_id_map = moe_permute_with_probs(
        inp, torch.zeros(routing_map.shape), routing_map, num_out_tokens
    )
    return rows, row_id_map


def moe_permute_with_probs(inp, probs, routing_map, num_out_tokens):
    if not inp.numel():
        return inp.clone(), probs.new_empty(0), torch.empty(0, dtype=torch.int64)
    assert num_out_tokens > 0, f"moe_permute requires num_out_tokens > 0, got {num_out_tokens}"
    expert, token = routing_map.bool().T.nonzero(as_tuple=True)
    assert len(token) == num_out_tokens, f"{num_out_tokens} rows were announced, not {len(token)}"
    return inp.index_select(0, token), probs[token, expert], token


def moe_unpermute(
    inp,
    row_id_map,
    merging_probs=None,
    restore_shape=None,
    map_type="mask",
    probs=None,
    pad_offsets=None,
):
    assert merging_probs is None
    assert pad_offsets is None
    if not inp.numel():
        return inp.clone()
    return _Unpermute.apply(inp, row_id_map, restore_shape)


class _Unpermute(torch.autograd.Function):
    """Keeps only the map, as Transformer Engine does; torch's `index_add` keeps the rows too."""

    @staticmethod
    def forward(ctx, inp, row_id_map, restore_shape):
        ctx.save_for_backward(row_id_map)
        return inp.new_zeros(restore_shape).index_add(0, row_id_map, inp)

    @staticmethod
    def backward(ctx, grad):
        (row_id_map,) = ctx.saved_tensors
        return grad.index_select(0, row_id_map), None, None


def moe_sort_chunks_by_index(inp, split_sizes, sorted_index):
    if not inp.numel():
        return inp.clone()
    chunks = inp.split(split_sizes.tolist())
    return torch.cat([chunks[i] for i in sorted_index.tolist()])


def moe_sort_chunks_by_index_with_probs(inp, probs, split_sizes, sorted_index):
    if not inp.numel():
        return inp.clone(), probs.clone()
    sorted_probs = moe_sort_chunks_by_index(probs, split_sizes, sorted_index)
    return moe_sort_chunks_by_index(inp, split_sizes, sorted_index), sorted_probs
