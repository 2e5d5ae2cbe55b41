"""Section `precision`: number formats, and how FP8 numbers are scaled."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moepp_megatron.config.schema.section import Section, unit

CrossEntropy = Literal["auto", "fused", "native", "unfused"]


class PrecisionSection(Section):
    """Number formats; FP8 names follow megatron-core's TransformerConfig."""

    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="Type of parameters and activations (the optimizer keeps fp32 copies of bf16 "
        "parameters)",
        json_schema_extra=unit("-"),
    )
    grad_reduce_in_fp32: bool = Field(
        default=True,
        description="Sum gradients over micro-batches and ranks in fp32; false sums them in bf16: "
        "half the memory and traffic, and every partial sum is rounded",
        json_schema_extra=unit("-"),
    )
    cross_entropy: CrossEntropy = Field(
        default="auto",
        description="How the loss is computed: fused, Triton kernels on the logits as they are; "
        "native and unfused, megatron-core's, on an fp32 copy; auto: fused on a GPU with Triton",
        json_schema_extra=unit("-"),
    )
    fp8: Literal["e4m3", "hybrid"] | None = Field(
        default=None,
        description="FP8 format of the GEMMs (Transformer Engine, GPU); null: off",
        json_schema_extra=unit("-"),
    )
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = Field(
        default=None,
        description="FP8 scaling; null with fp8 means delayed; mxfp8 is refused",
        json_schema_extra=unit("-"),
    )
    fp8_margin: int = Field(
        default=0,
        ge=0,
        le=8,
        description="Powers of two that delayed scaling leaves free above the largest value seen",
        json_schema_extra=unit("bits"),
    )
    fp8_amax_history_len: int = Field(
        default=1024,
        ge=1,
        description="Steps whose largest values delayed scaling remembers",
        json_schema_extra=unit("steps"),
    )
    fp8_amax_compute_algo: Literal["max", "most_recent"] = Field(
        default="max",
        description="Which of them delayed scaling takes",
        json_schema_extra=unit("-"),
    )
    fp8_param: bool = Field(
        default=False,
        description="Keep the GEMM weights in FP8 alone, beside the optimizer's fp32 copy",
        json_schema_extra=unit("-"),
    )
    first_last_layers_bf16: bool = Field(
        default=False,
        description="Run the first and last layers in bf16",
        json_schema_extra=unit("-"),
    )
    num_layers_at_start_in_bf16: int = Field(
        default=1,
        ge=0,
        description="With first_last_layers_bf16: first layers in bf16",
        json_schema_extra=unit("layers"),
    )
    num_layers_at_end_in_bf16: int = Field(
        default=1,
        ge=0,
        description="With first_last_layers_bf16: last layers in bf16",
        json_schema_extra=unit("layers"),
    )

    @property
    def gradient_bytes(self) -> int:
        """Bytes of a gradient in the buffer that micro-batches add to and ranks reduce."""
        return 4 if self.grad_reduce_in_fp32 or self.dtype == "fp32" else 2

    @property
    def recipe(self) -> str | None:
        """The FP8 recipe, the default resolved; None without FP8."""
        return None if self.fp8 is None else self.fp8_recipe or "delayed"
