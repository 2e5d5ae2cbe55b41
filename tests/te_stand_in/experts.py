"""One layer of the tiny model, its routing given, in FP8 or not."""

from types import SimpleNamespace

import torch
from megatron.core.fp8_utils import get_fp8_context

from moepp_megatron.moe.selection import Routing
from tests.te_stand_in.models import config_of, model_of

TOKENS, HIDDEN, FFN, TOPK = 32, 32, 4, 2


def layer_of(recipe, dispatcher="alltoall", **sections):
    """The second layer of the tiny model; the same weights with any recipe."""
    config = config_of(recipe, **{**sections, "moe": {"dispatcher": dispatcher}})
    return model_of(config).decoder.layers[1].mlp


def routing_to(counts, tokens=TOKENS, device=None):
    """Routing with `counts[i]` tokens for FFN expert i, the others' selections for copies.

    A token has at most two FFN experts, so that each has its two selections.
    """
    routing_map = torch.zeros(tokens, FFN + 4, dtype=torch.bool)
    token = 0
    for expert, count in enumerate(counts):
        for _ in range(count):
            routing_map[token % tokens, expert] = True
            token += 1
    assert token <= TOPK * tokens
    constants, copies = slice(FFN, FFN + 2), FFN + 2
    routing_map[:, copies] = routing_map.sum(dim=1) < TOPK
    routing_map[:, constants.start] = routing_map.sum(dim=1) < TOPK
    gates = torch.rand(routing_map.shape).masked_fill(~routing_map, 0.0)
    logits = torch.zeros(tokens, 1, FFN + 4)
    return Routing(
        gates.to(device).requires_grad_(),
        routing_map.to(device),
        None,
        None,
        logits=logits.to(device),
    )


def run(layer, routing, hidden):
    """The layer's output for this routing, and the rows that came to its experts."""
    seen = SimpleNamespace()

    def look(experts, arguments):
        seen.rows, seen.by_expert = arguments[0].shape[0], arguments[1].tolist()

    hook = layer.experts.register_forward_pre_hook(look)
    layer.router.forward = lambda *arguments, **tags: routing
    with get_fp8_context(layer.config):
        seen.output, _ = layer(hidden)
    hook.remove()
    return seen
