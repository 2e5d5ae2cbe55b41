"""Rules of `training.cuda_graphs`: which parts of a layer can be captured, with which settings."""

from __future__ import annotations

from moepp_megatron.config.rows import Rule, first, group, refuse
from moepp_megatron.config.schema import Config

_CAPTURABLE = ("attn", "moe_router")
# megatron-core's other parts, with the reason against each.
_REASONS = {
    "mlp": "a dense FFN is not captured by the MoE++ layer",
    "moe": "an expert gets another number of tokens in every step, and a graph's sizes are fixed",
    "moe_preprocess": "the all-to-all's sizes are read on the host, which no graph can do",
    "mamba": "there is no such layer here",
}
_REMEDY = "change that, or set training.cuda_graphs to []"


def _unknown(config: Config) -> list[str]:
    return [part for part in config.training.cuda_graphs if part not in _CAPTURABLE]


def _captures_router(config: Config) -> bool:
    return "moe_router" in config.training.cuda_graphs


def _only_capturable(config: Config) -> str:
    part = _unknown(config)[0]
    reason = _REASONS.get(part, "there is no such part")
    return f"must hold only {' and '.join(_CAPTURABLE)}, because of {part}: {reason}"


RULES: tuple[Rule, ...] = (
    first(
        refuse("training.cuda_graphs", _unknown, _only_capturable, "use [attn, moe_router]"),
        group(
            lambda c: c.training.cuda_graphs,
            refuse(
                "training.cuda_graphs",
                lambda c: c.moe.is_vanilla,
                "must have zero-computation experts or moe.gating_residual: for vanilla layers "
                "megatron-core's attn captures the experts as well, whose sizes are not fixed",
                _REMEDY,
            ),
            refuse(
                "training.cuda_graphs",
                lambda c: _captures_router(c) and c.moe.z_loss_coeff is not None,
                "must have moe.z_loss_coeff ({moe.z_loss_coeff}) null with moe_router: the "
                "loss is recorded by the host, which a graph does not repeat",
                _REMEDY,
            ),
            refuse(
                "training.cuda_graphs",
                lambda c: _captures_router(c) and c.moe.input_jitter_eps is not None,
                "must have moe.input_jitter_eps ({moe.input_jitter_eps}) null with moe_router: "
                "noise inside a graph has not been tested",
                _REMEDY,
            ),
        ),
    ),
)
