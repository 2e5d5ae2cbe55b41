"""Router health: metrics of one step's logits, gates and gradients.

Everything here is a sum over tokens, so sums over ranks are right in every layout. Nothing is
measured unless `RouterHealth.enabled` is set, which a training loop does for single steps.

Shape suffixes: T local tokens, E all experts, C constant experts.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from moepp_megatron.experts import CONSTANT
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.scores import score_of
from moepp_megatron.moe.selection import within_groups

_SCALARS = (
    "tokens",
    "logits",
    "entropy",
    "margin",
    "logit",
    "logit_square",
    "own_logit",
    "own_logit_square",
    "residual_norm",
    "own_norm",
    "balance_grad_square",
    "model_grad_square",
    "constant_gate",
    "constant_replaced",
    # Each rank that holds the layer adds its parameters' values once.
    "copies",
    "constant_norm",
    "row_cosine",
    "row_cosine_max",
)


class RouterHealth:
    """Sums of one MoE++ layer on one rank since the last reset.

    Attributes:
        enabled: True to measure forward passes.
        ffn_counts: [T] FFN experts of each token of the newest micro-batch; None before one.
    """

    def __init__(self, config: MoEPPConfig) -> None:
        self._config = config
        self.enabled = False
        self.reset()

    @staticmethod
    def names_for(topk: int) -> list[str]:
        """The name of each entry of `as_vector`, for layers with K `topk`."""
        return [*_SCALARS, *(f"tokens_with_{count}_ffn" for count in range(topk + 1))]

    def reset(self) -> None:
        """Forget everything measured."""
        self._sums: dict[str, Tensor] = {}
        self.ffn_counts: Tensor | None = None

    @torch.no_grad()
    def add_routing(
        self,
        logits: Tensor,
        own_logits: Tensor,
        routing_map: Tensor,
        bias: Tensor | None,
        padded: Tensor | None = None,
    ) -> None:
        """Measure the routing of one micro-batch.

        `logits` are those that the selection was made from, `own_logits` the same without the
        residual (`logits` itself where there is none), `routing_map` the selections that are
        carried out.
        """
        config = self._config
        ffn_counts = self.count_ffn(routing_map)
        has_residual = own_logits is not logits
        if padded is not None:
            logits, own_logits, ffn_counts = (
                values[~padded] for values in (logits, own_logits, ffn_counts)
            )
        score = score_of(config)
        scores = score.scores(logits)
        shares = score.shares(logits, scores)
        # x log x is 0 at 0.
        self._add("entropy", -(torch.xlogy(shares, shares)).sum())
        self._add("margin", _margins(scores if bias is None else scores + bias, config).sum())
        self._add("tokens", logits.new_full((), float(logits.shape[0])))
        self._add("logits", logits.new_full((), float(logits.numel())))
        for name, values in (("logit", logits), ("own_logit", own_logits)):
            self._add(name, values.sum())
            self._add(f"{name}_square", values.square().sum())
        self._add("own_norm", own_logits.norm(dim=-1).sum())
        if has_residual:
            self._add("residual_norm", (logits - own_logits).norm(dim=-1).sum())
        # Not `bincount`, for which the host waits to learn the largest.
        for count in range(config.router_topk + 1):
            self._add(f"tokens_with_{count}_ffn", (ffn_counts == count).sum().to(logits.dtype))

    def count_ffn(self, routing_map: Tensor) -> Tensor:
        """[T] FFN experts that each token gets, kept in `ffn_counts`; argument as above."""
        self.ffn_counts = routing_map[:, : self._config.num_ffn_experts].sum(dim=-1)
        return self.ffn_counts

    @torch.no_grad()
    def add_constants(self, gates: Tensor, mixing: Tensor, constants: Tensor) -> None:
        """Measure the constant experts of one micro-batch.

        `mixing` is [T, C, 2] fp32, parts of the input that each keeps and replaces; `constants` [C,
        D].
        """
        gates_TC = gates[:, self._config.columns(CONSTANT)]
        self._add("constant_gate", gates_TC.sum())
        self._add("constant_replaced", (gates_TC * mixing[..., 1]).sum())
        self._sums["constant_norm"] = constants.float().norm(dim=-1).mean()

    @torch.no_grad()
    def add_rows(self, weight: Tensor) -> None:
        """Measure the likeness of the rows of `weight` [E, ...], which gives the logits."""
        rows = F.normalize(weight.float().flatten(1), dim=-1)
        others = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        cosines = (rows @ rows.T)[others].abs()
        self._sums["row_cosine"], self._sums["row_cosine_max"] = cosines.mean(), cosines.max()
        self._sums["copies"] = cosines.new_ones(())

    def watch_gradients(self, logits: Tensor, attached: Tensor) -> None:
        """Compare, in the backward pass, the balance loss's pull with the model's.

        A z-loss counts with the balance loss. The model's pull is what else reaches the logits:
        through the gates, and through later layers' residuals, their balance losses included. Every
        use of the [..., E] `logits` has to come from this tensor; `attached` is the balance loss as
        `balance.attached_loss` returns it.
        """
        (pull,) = torch.autograd.grad(attached, logits, retain_graph=True)

        def measure(total: Tensor) -> None:
            scale = MoEAuxLossAutoScaler.main_loss_backward_scale
            balance = pull if scale is None else pull * scale
            self._add("balance_grad_square", balance.square().sum())
            self._add("model_grad_square", (total - balance).square().sum())

        logits.register_hook(measure)

    def as_vector(self) -> Tensor:
        """[names] float64 sums on the device, ordered as `names_for` with this layer's counts."""
        names = self.names_for(self._config.router_topk)
        missing = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
        return torch.stack([self._sums.get(name, missing).detach().double() for name in names])

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach()
        before = self._sums.get(name)
        self._sums[name] = value if before is None else before + value


def _margins(ranked: Tensor, config: MoEPPConfig) -> Tensor:
    """[T] score of the last selected expert less that of the first one that was not."""
    ranked = within_groups(ranked, ranked, config)
    allowed = config.group_topk * config.num_ffn_experts // config.num_groups
    if config.router_topk == allowed + config.num_zero_computation_experts:
        return ranked.new_zeros(ranked.shape[0])
    best = ranked.topk(config.router_topk + 1, dim=-1).values
    return best[:, -2] - best[:, -1]
