"""Section `precision`: number formats, and how FP8 numbers are scaled."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moepp_megatron.config.schema.section import Section, Unit

CrossEntropy = Literal["auto", "fused", "native", "unfused"]


class PrecisionSection(Section):
    """Number formats; FP8 names follow megatron-core's TransformerConfig."""

    dtype: Annotated[Literal["fp32", "bf16"], Unit("-")] = "fp32"
    """Type of parameters and activations (the optimizer keeps fp32 copies of bf16 parameters)"""
    grad_reduce_in_fp32: Annotated[bool, Unit("-")] = True
    """Sum gradients over micro-batches and ranks in fp32; false sums them in bf16: half the memory
    and traffic, and every partial sum is rounded"""
    cross_entropy: Annotated[CrossEntropy, Unit("-")] = "auto"
    """Loss implementation: fused, Triton kernels on the logits as they are; native and unfused,
    megatron-core's, on an fp32 copy; auto: fused on a GPU with Triton"""
    fp8: Annotated[Literal["e4m3", "hybrid"] | None, Unit("-")] = None
    """FP8 format of the GEMMs (Transformer Engine, GPU); null: off"""
    fp8_recipe: Annotated[
        Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None, Unit("-")
    ] = None
    """FP8 scaling; null with fp8 means delayed; mxfp8 needs a Blackwell GPU"""
    fp8_margin: Annotated[int, Unit("bits"), Field(ge=0, le=8)] = 0
    """Powers of two that delayed scaling leaves free above the largest value seen"""
    fp8_amax_history_len: Annotated[int, Unit("steps"), Field(ge=1)] = 1024
    """Steps whose largest values delayed scaling remembers"""
    fp8_amax_compute_algo: Annotated[Literal["max", "most_recent"], Unit("-")] = "max"
    """Value of these to use"""
    fp8_param: Annotated[bool, Unit("-")] = False
    """Keep the GEMM weights only in FP8, with the optimizer's fp32 copy"""
    first_last_layers_bf16: Annotated[bool, Unit("-")] = False
    """Run the first and last layers in bf16"""
    num_layers_at_start_in_bf16: Annotated[int, Unit("layers"), Field(ge=0)] = 1
    """With first_last_layers_bf16: first layers in bf16"""
    num_layers_at_end_in_bf16: Annotated[int, Unit("layers"), Field(ge=0)] = 1
    """With first_last_layers_bf16: last layers in bf16"""

    @property
    def gradient_bytes(self) -> int:
        """Bytes of a gradient in the buffer that micro-batches add to and ranks reduce."""
        return 4 if self.grad_reduce_in_fp32 else {"fp32": 4, "bf16": 2}[self.dtype]

    @property
    def recipe(self) -> str | None:
        """The FP8 recipe, the default resolved; None without FP8."""
        return None if self.fp8 is None else self.fp8_recipe or "delayed"
