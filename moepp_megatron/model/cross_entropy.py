"""The model's loss: this package's Triton kernels, or megatron-core's cross entropy."""

from __future__ import annotations

from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor


class WithCrossEntropy(LanguageModule):
    """A language model whose loss is `moe.kernels.cross_entropy` if `fuses_cross_entropy`.

    Else megatron-core computes it as `TransformerConfig.cross_entropy_loss_fusion` says.
    """

    fuses_cross_entropy = False

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """[b, s] fp32 cross entropy of each token.

        Args:
            labels: [b, s] int64; the loss of an id that is not in the vocabulary is to be masked.
            logits: [s, b, V / tp] this rank's columns. The backward pass of the fused kernels
                writes the gradient over them.
        """
        if not self.fuses_cross_entropy:
            loss: Tensor = super().compute_language_model_loss(labels, logits)
            return loss
        from moepp_megatron.moe.kernels.cross_entropy import cross_entropy

        labels = labels.transpose(0, 1).contiguous()
        return cross_entropy(logits, labels, self.tp_group).transpose(0, 1).contiguous()
