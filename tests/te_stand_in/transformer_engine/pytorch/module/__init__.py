"""Linear layers and norms. Bodies are torch's; signatures are Transformer Engine's."""

from transformer_engine.pytorch.module.linear import GroupedLinear, LayerNormLinear, Linear
from transformer_engine.pytorch.module.norm import LayerNorm, RMSNorm
from transformer_engine.pytorch.module.padding import Fp8Padding, Fp8Unpadding

__all__ = [
    "Fp8Padding",
    "Fp8Unpadding",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
]
