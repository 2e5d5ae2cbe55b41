"""Top-K selection of experts from router logits, and their gates.

Shape suffixes: T local tokens, E all experts, K selected per token, S sequences that are counted
each by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, assert_never

import torch
from torch import Tensor

from moepp_megatron.experts import ZERO
from moepp_megatron.moe.config import LEAST_LOGIT_STD, MoEPPConfig
from moepp_megatron.moe.scores import ffn_scores, score_of

if TYPE_CHECKING:
    from megatron.core.transformer.moe.router_replay import RouterReplay


class Routing(NamedTuple):
    """Routing of one micro-batch, and the inputs of its router's losses.

    Attributes:
        gates: [T, E] fp32 weight of every expert's output, 0 where not selected or dropped.
        routing_map: [T, E] bool selections; after `MoEPPRouter.finish` those within capacity.
        counts: [S, E] fp32 selections of each expert in each sequence; None where nothing is
            counted.
        score_sums: [S, E] fp32 scores, each token's divided by their sum, added up over the tokens
            of each sequence: T P_i; differentiable. None whenever `counts` is.
        logits: [s, b, E] fp32 router logits, residual included: the next MoE layer's residual.
            Those of padding are 0. None from `select`, which is given them.
        mixing_logits: [T, 2C] fp32 `U x` of the constant experts, where the gate's product has
            computed it too; else None.
    """

    gates: Tensor
    routing_map: Tensor
    counts: Tensor | None
    score_sums: Tensor | None
    logits: Tensor | None = None
    mixing_logits: Tensor | None = None


def select(
    logits: Tensor,
    bias: Tensor | None,
    config: MoEPPConfig,
    num_sequences: int | None,
    padded: Tensor | None = None,
    replay: RouterReplay | None = None,
) -> Routing:
    """Select experts and weigh them. `kernels.router.select` does the same on a GPU.

    Scores that are divided by a sum of scores are a softmax over the logarithms of scores, and are
    computed as such: a sum of tiny scores would underflow, its square in the gradient much earlier.
    Without a bias logits rank the experts as scores do, and still differ where scores underflow.

    Args:
        logits: [T, E] fp32, residual included; differentiable.
        bias: [E] fp32 added to the scores only for the selection, never to the gates; or None.
        config: `score_function`, `gate_normalization`, `gate_scale`, `router_topk` and the groups
            are read.
        num_sequences: S, with tokens ordered [sequence position, sequence] as in Megatron's
            [s, b, h]; 1 counts all tokens together; None counts nothing.
        padded: [T] bool tokens that are padding: they select nothing and are not counted. Their
            logits must be finite. None for none.
        replay: Records the selection, or gives one that takes its place; bias and groups then
            decide nothing. None: select. Not in the kernel.

    Raises:
        ValueError: If a given selection is not [T, K].
    """
    score = score_of(config)
    scores_TE, logs_TE = score.scores(logits), score.logs(logits)
    ranked_TE = _ranked(logits, scores_TE, bias, config)
    chosen_TK = _chosen(ranked_TE, config.router_topk, replay)
    gates_TK = _gates(scores_TE, logs_TE, chosen_TK, config)
    gates_TE = torch.zeros_like(scores_TE).scatter(1, chosen_TK, gates_TK)
    routing_map_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, chosen_TK, True)
    shares_TE = score.shares(logits, scores_TE)
    if padded is not None:
        padded_T1 = padded.unsqueeze(-1)
        gates_TE, shares_TE = (t.masked_fill(padded_T1, 0.0) for t in (gates_TE, shares_TE))
        routing_map_TE = routing_map_TE & ~padded_T1
    if num_sequences is None:
        return Routing(gates_TE, routing_map_TE, None, None)
    by_sequence = (-1, num_sequences, logits.shape[1])
    counts_SE = routing_map_TE.view(by_sequence).sum(dim=0, dtype=torch.float32)
    sums_SE = shares_TE.view(by_sequence).sum(dim=0)
    return Routing(gates_TE, routing_map_TE, counts_SE, sums_SE)


def _ranked(logits: Tensor, scores: Tensor, bias: Tensor | None, config: MoEPPConfig) -> Tensor:
    """[T, E] fp32 by which experts are ranked: biased scores, or logits; see `select`."""
    if bias is not None:
        ranked_TE = scores.detach() + bias
        return within_groups(ranked_TE, ranked_TE, config)
    ranked_TE = logits.detach()
    if not config.limits_groups:
        return ranked_TE
    # Among only FFN experts, for scores that are all 0 would not distinguish groups.
    return within_groups(ranked_TE, ffn_scores(ranked_TE, config), config)


def _chosen(ranked_TE: Tensor, topk: int, replay: RouterReplay | None) -> Tensor:
    """[T, K] int64 selected experts, those of `replay` where it gives some."""
    if replay is None:
        return _top_experts(ranked_TE, topk)
    # Any object with this method: loops of reinforcement learning put their own in its place.
    _, chosen_TK = replay.get_replay_topk(ranked_TE, topk, None, None, _best)
    if chosen_TK.shape != (len(ranked_TE), topk):
        raise ValueError(
            f"replayed routes {list(chosen_TK.shape)} must be [{len(ranked_TE)}, {topk}], experts "
            "of each token of this rank's micro-batch; give each router those of its own tokens"
        )
    return chosen_TK.long()


def _best(
    scores_TE: Tensor, topk: int, num_groups: int | None = None, group_topk: int | None = None
) -> tuple[Tensor, Tensor]:
    """[T, K] scores and experts, as `RouterReplay` calls it; groups are limited before."""
    chosen_TK = _top_experts(scores_TE, topk)
    return scores_TE.gather(1, chosen_TK), chosen_TK


def _gates(scores_TE: Tensor, logs_TE: Tensor, chosen_TK: Tensor, config: MoEPPConfig) -> Tensor:
    """[T, K] gates of the chosen experts under the configured normalisation."""
    match config.gate_normalization:
        case "none":
            gates_TK = scores_TE.gather(1, chosen_TK)
        case "selected":
            gates_TK = torch.softmax(logs_TE.gather(1, chosen_TK), dim=-1)
        case "nonzero":
            is_zero_TK = chosen_TK >= config.columns(ZERO).start
            # The least number and not -inf: a token whose picks are all zero experts has finite
            # gradients, and gates of 0.
            least = torch.finfo(logs_TE.dtype).min
            logs_TK = logs_TE.gather(1, chosen_TK).masked_fill(is_zero_TK, least)
            gates_TK = torch.softmax(logs_TK, dim=-1).masked_fill(is_zero_TK, 0.0)
        case other:
            assert_never(other)
    return gates_TK if config.gate_scale == 1.0 else gates_TK * config.gate_scale


def standardized(logits: Tensor, std: float | None, whole: Tensor | None = None) -> Tensor:
    """Rescale [T, E] logits to this unbiased standard deviation per token; None leaves them.

    `logits` that are a summand of `whole` [T, E] are rescaled as it is. For logits that are all
    equal the deviation is 0: the divisor has a lower bound, so they stay finite.
    """
    if std is None:
        return logits
    spread_T1 = (logits if whole is None else whole).std(dim=-1, keepdim=True)
    spread_T1 = spread_T1.clamp(min=LEAST_LOGIT_STD)
    return logits * (std / spread_T1)


@torch.no_grad()
def _top_experts(scores: Tensor, topk: int) -> Tensor:
    """[T, K] int64 experts with the largest of [T, E] scores first; the first of equal ones."""
    # `torch.topk` leaves open which of two equal scores it returns, and its choice differs with the
    # number of experts and the device. So no two keys are equal here: a key is the score's fp32
    # bits, which order as the floats do once negative ones are turned around, with the expert's
    # number, counted from the last, in the places below.
    num_experts = scores.shape[-1]
    # Adding 0 makes -0 equal to 0.
    bits = (scores.float() + 0.0).view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    from_last = torch.arange(num_experts - 1, -1, -1, device=scores.device)
    return (keys * num_experts + from_last).topk(topk, dim=-1).indices


@torch.no_grad()
def within_groups(ranked: Tensor, affinities: Tensor, config: MoEPPConfig) -> Tensor:
    """`ranked` with -inf for FFN experts outside of a token's best groups.

    Where groups are nodes, a token's hidden state goes to at most `group_topk` of them. The
    definition is `moe.reference.in_best_groups`.

    Both arguments are [T, E] fp32. A group counts by the sum of its K / `group_topk` largest
    `affinities`. `ranked` itself is returned where all groups are kept. Source: DeepSeek-V3, arXiv
    2412.19437, section 2.1.2.
    """
    if not config.limits_groups:
        return ranked
    ffn, groups, kept = config.num_ffn_experts, config.num_groups, config.group_topk
    by_group = affinities[:, :ffn].unflatten(1, (groups, ffn // groups))
    sums_TG = by_group.topk(config.router_topk // kept, dim=-1).values.sum(dim=-1)
    # Stable: between equal groups the first one, which `topk` would not promise.
    best_TM = sums_TG.argsort(dim=-1, descending=True, stable=True)[:, :kept]
    others_TG = torch.ones_like(sums_TG, dtype=torch.bool).scatter(1, best_TM, False)
    masked = ranked.clone()
    by_group = masked[:, :ffn].unflatten(1, (groups, ffn // groups))
    by_group.masked_fill_(others_TG.unsqueeze(-1), -torch.inf)
    return masked
