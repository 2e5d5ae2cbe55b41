"""The models of the paper and its measured expert forward times (arXiv 2410.07348, table 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moepp_megatron.experts import ExpertLayout

_TAUS = (0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class PaperShape:
    """One MoE layer of a model of the paper, under the paper's name for it.

    `ffn_hidden_size` is the width of each FFN expert. `vanilla_ms` and, by tau, `moepp_ms` are the
    paper's expert forward times, milliseconds.
    """

    name: str
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    experts: ExpertLayout
    vanilla_ms: float
    moepp_ms: Mapping[float, float]

    def paper_efficiency(self, tau: float) -> float | None:
        """The paper's speedup times phi; None where it gives no time for `tau`."""
        measured = self.moepp_ms.get(tau)
        return None if measured is None else self.vanilla_ms / measured * self.experts.phi(tau)

    def with_constants(self, count: int) -> PaperShape:
        """The same layer with other constant experts, which are not in the paper."""
        experts = replace(self.experts, num_constant_experts=count)
        return replace(self, experts=experts, moepp_ms={})


def _shape(
    name: str, width: tuple[int, int, int], ffn: int, constant: int, vanilla: float, *moepp: float
) -> PaperShape:
    """A layer of the paper, which has one copy and one zero expert; hidden, FFN width, heads."""
    experts = ExpertLayout(num_ffn_experts=ffn, num_constant_experts=constant)
    taus = _TAUS if len(moepp) > 1 else (0.75,)
    return PaperShape(name, *width, experts, vanilla, dict(zip(taus, moepp, strict=True)))


SHAPES = {
    shape.name: shape
    for shape in (
        _shape("0.6B", (768, 2048, 12), 8, 2, 535.3, 202.4, 277.8, 387.3, 427.6, 449.6),
        _shape("1B", (768, 2048, 12), 16, 2, 610.9, 289.3, 384.9, 469.7, 500.3, 530.2),
        _shape("2B", (768, 2048, 12), 32, 6, 683.4, 417.9, 473.7, 532.7, 561.0, 590.5),
        _shape("7B", (1536, 4096, 16), 16, 2, 1859.0, 1455.0),
    )
}
