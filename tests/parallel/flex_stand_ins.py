"""Stand-ins for DeepEP's fused functions and HybridEP's buffer, which need GPUs.

They do what the packages document. DeepEP: a token goes once to every rank that holds one of its
experts, -1 marks a slot without expert, combining adds up what comes back. HybridEP: it takes the
routing map and returns the experts' batch.
"""

from tests.parallel.training_runs import train


def fused_dispatch(x, token_indices, token_probs, num_experts, group, **kwargs):
    """DeepEP's dispatch, by gathering everything and keeping what is for this rank."""
    import torch
    import torch.distributed as dist
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    assert token_indices.dtype is torch.int64
    assert token_probs.dtype is torch.float32
    local = num_experts // group.size()
    all_x = gather_from_sequence_parallel_region(x, group=group)
    all_probs = gather_from_sequence_parallel_region(token_probs, group=group)
    all_indices = token_indices.new_empty(all_x.shape[0], token_indices.shape[1])
    dist.all_gather_into_tensor(all_indices, token_indices.contiguous(), group=group)
    is_mine = all_indices // local == group.rank()
    rows = is_mine.any(dim=1).nonzero().squeeze(1)
    is_mine = is_mine[rows]
    indices = torch.where(is_mine, all_indices[rows] % local, -1)
    probs = torch.where(is_mine, all_probs[rows], 0.0)
    counts = torch.stack([(indices == expert).sum() for expert in range(local)])
    return all_x[rows], indices, probs, counts, (rows, all_x.shape[0])


def fused_combine(x, group, handle, **kwargs):
    """DeepEP's combine: every token's results from all ranks, added up on its own rank."""
    from megatron.core.tensor_parallel.mappings import reduce_scatter_to_sequence_parallel_region

    rows, total = handle
    whole = x.new_zeros(total, x.shape[1]).index_add(0, rows, x)
    return reduce_scatter_to_sequence_parallel_region(whole, group=group), None


class HybridEPBuffer:
    """HybridEP's buffer: what it documents, by gathering everything and keeping what is here."""

    def __init__(self, group, hidden_dim, max_num_of_tokens_per_rank, **kwargs):
        self.group, self.tokens = group, max_num_of_tokens_per_rank
        # Its kernels are compiled for whole chunks.
        assert max_num_of_tokens_per_rank % 64 == 0

    def _everywhere(self, tensor):
        import torch.distributed as dist

        whole = tensor.new_empty(self.group.size() * tensor.shape[0], *tensor.shape[1:])
        dist.all_gather_into_tensor(whole, tensor.contiguous(), group=self.group)
        return whole

    def _own_rows_of_sum(self, whole):
        import torch.distributed as dist

        dist.all_reduce(whole, group=self.group)
        return whole.chunk(self.group.size())[self.group.rank()]

    def dispatch_with_permute(
        self,
        *,
        hidden,
        routing_map=None,
        probs=None,
        num_of_experts_per_rank=0,
        handle=None,
        num_permuted_tokens=None,
        **kwargs,
    ):
        import torch

        assert hidden.shape[0] == self.tokens, "every rank has the same number of tokens"
        if handle is None:
            assert routing_map.dtype is torch.bool
            assert probs.dtype is torch.float32
            first = self.group.rank() * num_of_experts_per_rank
            last = first + num_of_experts_per_rank
            local = self._everywhere(routing_map.to(torch.uint8))[:, first:last].bool()
            expert, row = local.T.nonzero(as_tuple=True)
            handle = (row, expert + first, routing_map.shape[1], local.sum(dim=0))
        row, expert, _, counts = handle
        gates = None if probs is None else self._everywhere(probs)[row, expert]
        return self._everywhere(hidden)[row], gates, None, counts, handle

    def combine_with_unpermute(self, *, hidden, handle, probs=None, **kwargs):
        row, expert, num_experts, _ = handle
        total = self.tokens * self.group.size()
        whole = hidden.new_zeros(total, hidden.shape[1]).index_add(0, row, hidden)
        if probs is not None:
            gates = probs.new_zeros(total, num_experts)
            gates[row, expert] = probs
            probs = self._own_rows_of_sum(gates)
        return self._own_rows_of_sum(whole), probs


def hybrid_ep_dispatch(x, routing_map, probs, group, num_local_experts, **kwargs):
    """As megatron-core defines it where HybridEP is installed."""
    from megatron.core.transformer.moe.fused_a2a import HybridEPDispatch

    names = ("num_sms_dispatch_api", "num_sms_combine_api", "num_blocks_permute")
    names += ("num_blocks_unpermute", "fused", "num_permuted_tokens", "pad_multiple")
    rest = [kwargs[name] for name in (*names, "num_sms_preprocessing_api")]
    return HybridEPDispatch.apply(x, routing_map, probs, group, num_local_experts, *rest)


def hybrid_ep_combine(x, handle, num_permuted_tokens, pad_multiple, fused):
    """As megatron-core defines it where HybridEP is installed."""
    from megatron.core.transformer.moe.fused_a2a import HybridEPCombine

    return HybridEPCombine.apply(x, handle, num_permuted_tokens, pad_multiple, fused)


def train_with_deepep(*args):
    return _train_with(
        {
            "fused_dispatch": fused_dispatch,
            "fused_combine": fused_combine,
            "set_deepep_num_sms": lambda number: None,
        },
        *args,
    )


def train_with_hybridep(raw, *args):
    """Trains with `moe.flex_backend` hybridep; dispatch and combine are megatron-core's own."""
    from megatron.core.transformer.moe import fused_a2a

    raw = {**raw, "moe": {**raw["moe"], "flex_backend": "hybridep"}}
    stand_ins = {"hybrid_ep_dispatch": hybrid_ep_dispatch, "hybrid_ep_combine": hybrid_ep_combine}
    fused_a2a.HybridEPBuffer = HybridEPBuffer
    try:
        return _train_with(stand_ins, raw, *args)
    finally:
        del fused_a2a.HybridEPBuffer
        fused_a2a.reset_hybrid_ep_buffer()


def _train_with(stand_ins, *args):
    from megatron.core.transformer.moe import token_dispatcher

    before = {name: getattr(token_dispatcher, name) for name in stand_ins}
    try:
        for name, function in stand_ins.items():
            setattr(token_dispatcher, name, function)
        return train(*args)
    finally:
        for name, function in before.items():
            setattr(token_dispatcher, name, function)
