"""RMSNorm for megatron-core's local modules, usable with sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moepp_megatron.runtime.optional import fused_rms_norm


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` with a mark by which Megatron sums its gradient over tensor ranks.

    megatron-core's local norm refuses sequence parallelism because torch's norm has no such mark.
    Where apex is installed, its fused kernel computes it.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__(
            hidden_size,
            eps=eps,
            device=torch.cuda.current_device(),
            dtype=config.params_dtype,
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._fused = fused_rms_norm()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of `x`."""
        if self._fused is None:
            return super().forward(x)
        normed: Tensor = self._fused(x, self.weight, self.normalized_shape, self.eps)
        return normed
