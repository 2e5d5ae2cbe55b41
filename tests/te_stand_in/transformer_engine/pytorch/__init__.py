"""The names that megatron-core imports."""

# ruff: noqa: F401
from types import SimpleNamespace

from transformer_engine.pytorch import (
    attention,
    distributed,
    fp8,
    module,
    optimizers,
    permutation,
    quantization,
    record,
    router,
    tensor,
)
from transformer_engine.pytorch.attention import DotProductAttention
from transformer_engine.pytorch.module import (
    Fp8Padding,
    Fp8Unpadding,
    GroupedLinear,
    LayerNorm,
    LayerNormLinear,
    Linear,
    RMSNorm,
)
from transformer_engine.pytorch.quantization import (
    autocast,
    fp8_autocast,
    fp8_model_init,
    quantized_model_init,
)

# megatron-core names its classes in annotations only.
ops = SimpleNamespace(Sequential=object, FusibleOperation=object)
