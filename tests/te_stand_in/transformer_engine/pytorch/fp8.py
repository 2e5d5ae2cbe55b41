# ruff: noqa: F401
from transformer_engine.pytorch.quantization import (
    FP8GlobalStateManager,
    fp8_autocast,
    fp8_model_init,
)
