"""Routings that training rarely reaches, forced through the routers of a built model.

Each function is a `prepare` of `training_runs.train`. Router weights are made small and a constant
is added to the logits by place in the sequence, the same in every layout; the margin leaves
softmax enough that no gradient vanishes.
"""

from moepp_megatron.experts import ZERO

MARGIN = 4.0


def only_zero_experts(models):
    """Every token selects zero experts (there must be K of them): no FFN token anywhere."""
    _force(models, lambda moepp, is_late: _zero_experts(moepp))


def one_ffn_expert(models):
    """Every token selects FFN expert 0 and the zero expert."""
    _force(models, lambda moepp, is_late: [0, *_zero_experts(moepp)])


def first_half_of_ffn_experts(models):
    """Every token selects among the first half of the FFN experts; the others get none."""
    _force(models, lambda moepp, is_late: list(range(moepp.num_ffn_experts // 2)))


def one_ffn_expert_of_each_half(models):
    """Every token selects the first FFN expert of either half, and zero experts: an even load."""
    _force(models, lambda moepp, is_late: [0, moepp.num_ffn_experts // 2, *_zero_experts(moepp)])


def second_half_without_ffn(models):
    """Tokens of the second half of a sequence select zero experts: a rank may send no FFN token."""
    _force(models, lambda moepp, is_late: _zero_experts(moepp) if is_late else [])


def duplicate_router_rows(models):
    """Every FFN expert has the router row of its neighbour: pairs of equal logits."""
    import torch

    for router in _routers(models):
        with torch.no_grad():
            for weight in (router.weight, router.residual_weight):
                if weight is not None:
                    ffn = weight[: router.moepp.num_ffn_experts]
                    ffn[1::2] = ffn[0::2]


def vary_norms(chunks):
    """Weights of which each is different: at 1, as they begin, another head's would do as well."""
    import torch

    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if "q_layernorm" in name or "k_layernorm" in name:
                steps = torch.arange(parameter.numel(), dtype=parameter.dtype)
                parameter.data.copy_(1.0 + 0.5 * torch.sin(1.0 + steps))


def pad_some(models):
    """Give every forward pass a mask that follows from its tokens, unevenly over ranks."""
    for model in models:
        model.forward = _with_mask(model.forward)
        if hasattr(model, "build_schedule_plan"):
            model.build_schedule_plan = _with_mask(model.build_schedule_plan)


def _with_mask(function):
    def inner(input_ids, *args, **kwargs):
        return function(input_ids, *args, padding_mask=input_ids % 5 < 2, **kwargs)

    return inner


def _zero_experts(moepp):
    return list(range(moepp.columns(ZERO).start, moepp.columns(ZERO).stop))


def _routers(models):
    from moepp_megatron.moe.router import MoEPPRouter

    for model in models:
        yield from (module for module in model.modules() if isinstance(module, MoEPPRouter))


def _force(models, favoured):
    """Add MARGIN to the logits of `favoured(moepp, whether in a sequence's second half)`."""
    import torch

    for router in _routers(models):
        with torch.no_grad():
            for parameter in router.parameters():
                parameter.mul_(0.1)
        length = models[0].max_sequence_length
        places = places_of_this_rank(length)
        bias = torch.zeros(len(places), 1, router.moepp.num_experts)
        for row, place in enumerate(places):
            bias[row, 0, favoured(router.moepp, place >= length // 2)] = MARGIN
        router.second_layer = _biased(router.second_layer, bias)


def _biased(last_step, bias):
    def biased(hidden):
        return last_step(hidden) + bias.to(hidden.device)

    return biased


def places_of_this_rank(length):
    """Places in the sequence of this rank's tokens: context zigzag, then tensor-parallel parts."""
    from megatron.core import parallel_state

    cp = parallel_state.get_context_parallel_world_size()
    tp = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_context_parallel_rank()
    places = list(range(length))
    if cp > 1:
        chunk = length // (2 * cp)
        late = 2 * cp - 1 - rank
        early_places = places[rank * chunk : (rank + 1) * chunk]
        places = early_places + places[late * chunk : (late + 1) * chunk]
    part = len(places) // tp
    first = parallel_state.get_tensor_model_parallel_rank() * part
    return places[first : first + part]
