"""The MoE++ layer in plain PyTorch on one process: the readable definition of what is right.

Written for the reader, not for speed: every expert is called on the tokens that selected it, one
after the other. The parallel layer is tested against this file in every layout.

Shape suffixes: T tokens, D hidden size, E all experts, K selected experts per token, H expert FFN
width. Expert order: FFN, constant, copy, zero. Source: arXiv 2410.07348, named where used.
"""

from typing import NamedTuple, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepp_megatron.experts import CONSTANT, COPY, ZERO
from moepp_megatron.moe.capacity import GATE_STEPS, capacities
from moepp_megatron.moe.config import LEAST_LOGIT_STD, MoEPPConfig
from moepp_megatron.moe.scores import ffn_scores, score_of


class _ReferenceOutput(NamedTuple):
    """The results of one layer."""

    hidden_TD: Tensor
    logits_TE: Tensor  # fp32, residual included: the next layer's `previous_logits_TE`
    gates_TE: Tensor  # weight of each expert's output, 0 where not selected or dropped
    selected_TE: Tensor  # bool, before any capacity limit
    balance_loss: Tensor  # L_b of these tokens, not yet multiplied by beta


class ReferenceMoEPP(nn.Module):
    """One MoE++ layer.

    Args:
        config: The layer's settings.
        hidden_size: D.
        ffn_hidden_size: H of one SwiGLU expert.
        has_residual: Whether this layer sees a previous router (every MoE layer but the first).
    """

    def __init__(
        self, config: MoEPPConfig, hidden_size: int, ffn_hidden_size: int, has_residual: bool = True
    ) -> None:
        super().__init__()
        self.config = config
        E, D, H = config.num_experts, hidden_size, ffn_hidden_size
        self.gate_weights = nn.ParameterList(
            torch.randn(shape) * 0.02 for shape in config.gate_shapes(D)
        )
        self.residual_weight = (
            nn.Parameter(torch.randn(E, E) * 0.02)
            if config.gating_residual and has_residual
            else None
        )
        # Added to the scores only for the selection; set by a rule, not by gradients.
        self.selection_bias_E = torch.zeros(E) if config.selection_bias else None
        self.expert_in = nn.Parameter(torch.randn(config.num_ffn_experts, 2 * H, D) * 0.02)
        self.expert_out = nn.Parameter(torch.randn(config.num_ffn_experts, D, H) * 0.02)
        self.constants = nn.Parameter(torch.randn(config.num_constant_experts, D) * 0.02)
        if config.constant_init == "zero":
            nn.init.zeros_(self.constants)
        self.mixing_weight = nn.Parameter(torch.randn(config.num_constant_experts, 2, D) * 0.02)

    def forward(
        self, x_TD: Tensor, previous_logits_TE: Tensor | None = None, padded_T: Tensor | None = None
    ) -> _ReferenceOutput:
        """Route the tokens, run the selected experts, add up what they return.

        With `padded_T` (bool, True for padding) only the other tokens are processed; the output for
        padding is 0.
        """
        if padded_T is not None:
            return self._without_padding(x_TD, previous_logits_TE, padded_T)
        logits_TE = self.route(x_TD, previous_logits_TE)
        gates_TE, selected_TE, scores_TE = select_experts(
            logits_TE, self.config, self.selection_bias_E
        )
        if self.config.capacity_factor is not None:
            gates_TE = gates_TE * within_capacity(gates_TE, selected_TE, self.config)

        # The released model scales the experts' input, not the router's.
        expert_input_TD = x_TD * self.config.expert_input_scale
        output_TD = torch.zeros_like(x_TD)
        for index in range(self.config.num_experts):
            tokens = selected_TE[:, index].nonzero().squeeze(-1)
            result = self.expert(index, expert_input_TD[tokens])
            weighted = gates_TE[tokens, index, None] * result
            output_TD = output_TD.index_add(0, tokens, weighted.to(x_TD.dtype))
        loss = balance_loss(scores_TE, selected_TE, self.config)
        return _ReferenceOutput(output_TD, logits_TE, gates_TE, selected_TE, loss)

    def _without_padding(
        self, x_TD: Tensor, previous_logits_TE: Tensor | None, padded_T: Tensor
    ) -> _ReferenceOutput:
        tokens = (~padded_T).nonzero().squeeze(-1)
        others = [t if t is None else t[tokens] for t in (x_TD, previous_logits_TE)]

        def in_place(values: Tensor) -> Tensor:
            return values.new_zeros(len(x_TD), values.shape[1]).index_copy(0, tokens, values)

        *of_tokens, loss = self(*others)
        return _ReferenceOutput._make([*map(in_place, of_tokens), loss])

    def route(self, x_TD: Tensor, previous_logits_TE: Tensor | None) -> Tensor:
        """Router logits: `z_j = W_j x + G_j z_(j-1)` (gating residuals), in fp32."""
        logits_TE = F.linear(x_TD.float(), self.gate_weights[0].float())
        if self.config.two_layer_gate:
            logits_TE = F.linear(torch.tanh(logits_TE), self.gate_weights[1].float())
        if self.residual_weight is not None and previous_logits_TE is not None:
            logits_TE = logits_TE + F.linear(previous_logits_TE, self.residual_weight.float())
        return logits_TE

    def expert(self, index: int, x: Tensor) -> Tensor:
        """Compute expert `index` on the tokens `x`."""
        config = self.config
        if index < config.num_ffn_experts:
            gate, up = F.linear(x, self.expert_in[index]).chunk(2, dim=-1)
            return F.linear(F.silu(gate) * up, self.expert_out[index])
        if index < config.columns(CONSTANT).stop:
            c = index - config.num_ffn_experts
            mixing = F.linear(x, self.mixing_weight[c]).float() / config.constant_temperature
            keep, replace = torch.softmax(mixing, -1).split(1, -1)
            return keep * x + replace * self.constants[c]
        if index < config.columns(COPY).stop:
            return x
        assert index >= config.columns(ZERO).start, f"expert {index} is of an undefined kind"
        return torch.zeros_like(x)


def select_experts(
    logits_TE: Tensor, config: MoEPPConfig, selection_bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Top-K selection and the gates of the selected experts.

    Returns:
        gates_TE: fp32, 0 where not selected.
        selected_TE: bool, K ones per row.
        scores_TE: fp32, the probabilities that the balance loss averages (rows sum to 1).
    """
    logits_TE = _standardized(logits_TE, config)
    score = score_of(config)
    scores_TE, logs_TE = score.scores(logits_TE), score.logs(logits_TE)
    # Logits rank as scores do, and still differ where scores underflow.
    ranked_TE = logits_TE if selection_bias_E is None else scores_TE + selection_bias_E
    ranked_TE = in_best_groups(ranked_TE, logits_TE, config, selection_bias_E)
    # Between equal experts the first one, which `topk` would not promise.
    chosen_TK = ranked_TE.argsort(dim=-1, descending=True, stable=True)[:, : config.router_topk]
    selected_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, chosen_TK, True)
    gates_TE = _gates(scores_TE, logs_TE, selected_TE, config)
    # The scores divided by their sum, which may underflow.
    return gates_TE, selected_TE, torch.softmax(logs_TE, dim=-1)


def in_best_groups(
    ranked_TE: Tensor,
    logits_TE: Tensor,
    config: MoEPPConfig,
    selection_bias_E: Tensor | None = None,
) -> Tensor:
    """Group-limited routing (DeepSeek-V3, arXiv 2412.19437, section 2.1.2) with MoE++'s experts.

    FFN experts are divided into `num_groups` groups of neighbours. A group's score is the sum of
    its K / `group_topk` (rounded down) largest affinities, and a token may select FFN experts of
    only its `group_topk` best groups; between equal groups the first one is better. Affinities are
    what ranks experts, the scores with their biases; without biases, the scores of a router of only
    FFN experts, which order groups in the same way and do not underflow where zero-computation
    experts have nearly all of the softmax.

    Zero-computation experts are in no group, change no group's score, and can always be selected:
    they and the FFN experts of the best groups are ranked in one top-K. Gates and scores are not
    changed.

    Returns:
        `ranked_TE` with -inf for the FFN experts of the other groups.
    """
    if config.group_topk == config.num_groups:
        return ranked_TE
    affinity_TE = ranked_TE
    if selection_bias_E is None:
        affinity_TE = ffn_scores(logits_TE, config)
    size = config.num_ffn_experts // config.num_groups
    masked_TE = ranked_TE.clone()
    for token, affinities in enumerate(affinity_TE[:, : config.num_ffn_experts]):
        groups = affinities.view(config.num_groups, size).sort(dim=-1, descending=True).values
        sums = groups[:, : config.router_topk // config.group_topk].sum(dim=-1)
        best = sums.argsort(descending=True, stable=True)[: config.group_topk].tolist()
        for group in set(range(config.num_groups)) - set(best):
            masked_TE[token, group * size : (group + 1) * size] = -torch.inf
    return masked_TE


def _standardized(logits_TE: Tensor, config: MoEPPConfig) -> Tensor:
    """Logits of standard deviation `logits_norm_std`; those that are all equal stay equal."""
    if config.logits_norm_std is None:
        return logits_TE
    spread_T1 = logits_TE.std(dim=-1, keepdim=True).clamp(min=LEAST_LOGIT_STD)
    return logits_TE * (config.logits_norm_std / spread_T1)


def _gates(scores_TE: Tensor, logs_TE: Tensor, selected_TE: Tensor, config: MoEPPConfig) -> Tensor:
    """Gates of the selected experts under the configured normalisation, 0 elsewhere."""
    counted_TE = selected_TE.clone()
    match config.gate_normalization:
        case "none":
            return torch.where(selected_TE, scores_TE, 0.0) * config.gate_scale
        case "selected":
            pass
        case "nonzero":
            counted_TE[:, config.columns(ZERO)] = False
        case other:
            assert_never(other)
    # The scores divided by their sum: a softmax over their logarithms, which do not underflow.
    logs_TE = torch.where(counted_TE, logs_TE, -torch.inf)
    # A token whose picks are all zero experts has nothing to divide: its gates are 0.
    logs_TE = torch.where(counted_TE.any(dim=-1, keepdim=True), logs_TE, 0.0)
    return torch.where(counted_TE, torch.softmax(logs_TE, dim=-1), 0.0) * config.gate_scale


def balance_loss(scores_TE: Tensor, selected_TE: Tensor, config: MoEPPConfig) -> Tensor:
    """L_b of these tokens, no beta: `sum_i eta_i f_i P_i` (heterogeneous load balance loss).

    ZEDA's grouped loss (arXiv 2605.18643) is `(F + w Z) / K (f_F P_F / F + f_Z P_Z / (w Z))` with
    w = 1 / tau and the sums of f and P over the FFN experts and over the others.
    """
    fraction_E, mean_E = selected_TE.float().mean(dim=0), scores_TE.mean(dim=0)
    match config.balance_loss:
        case "heterogeneous":
            eta_E = torch.tensor(config.balance_weights(), device=scores_TE.device)
            return (eta_E * fraction_E * mean_E).sum()
        case "grouped":
            ffn = config.num_ffn_experts
            weighed = config.num_zero_computation_experts / config.tau
            loss = fraction_E[:ffn].sum() * mean_E[:ffn].sum() / ffn
            if weighed > 0.0:
                loss = loss + fraction_E[ffn:].sum() * mean_E[ffn:].sum() / weighed
            return loss * (ffn + weighed) / config.router_topk
        case other:
            assert_never(other)


def moved_bias(
    bias_E: Tensor, selected_TE: Tensor, config: MoEPPConfig, update_rate: float
) -> Tensor:
    """The selection bias after a batch of tokens: balancing without a loss (arXiv 2408.15664).

    As megatron-core, `b_i + rate sign(mean load - load of i)`, where the load of a zero-computation
    expert counts tau times, as in the balance loss: equal loads send phi of the selections to FFN
    experts.
    """
    eta_E = torch.tensor(config.balance_weights())
    load_E = eta_E * selected_TE.float().sum(dim=0)
    return bias_E + update_rate * torch.sign(load_E.mean() - load_E)


def within_capacity(gates_TE: Tensor, selected_TE: Tensor, config: MoEPPConfig) -> Tensor:
    """Keep the selections (bool [T, E]) with the largest gates of each expert.

    Between equal gates the earlier token is kept. Gates are compared in steps of 1 / GATE_STEPS, so
    that rounding decides nothing.
    """
    kept_TE = torch.zeros_like(selected_TE)
    for index, capacity in enumerate(capacities(config, gates_TE.shape[0])):
        steps = (gates_TE[:, index] * GATE_STEPS).round()
        rank = torch.where(selected_TE[:, index], steps, -1.0)
        order = rank.argsort(descending=True, stable=True)[:capacity]
        kept_TE[order, index] = True
    return kept_TE & selected_TE
