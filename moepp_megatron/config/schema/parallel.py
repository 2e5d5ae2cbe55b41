"""Section `parallel`: how the model is laid out over ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moepp_megatron.config.schema.section import Section, unit


class ParallelSection(Section):
    """Degrees of parallelism; names follow megatron-core's ModelParallelConfig."""

    tensor_model_parallel_size: int = Field(
        default=1, ge=1, description="Ranks that split each layer", json_schema_extra=unit("ranks")
    )
    pipeline_model_parallel_size: int = Field(
        default=1, ge=1, description="Pipeline stages", json_schema_extra=unit("ranks")
    )
    virtual_pipeline_model_parallel_size: int | None = Field(
        default=None,
        ge=2,
        description="Model chunks per pipeline rank (interleaved schedule); null: one",
        json_schema_extra=unit("chunks"),
    )
    pipeline_model_parallel_layout: str | None = Field(
        default=None,
        description="Layers per stage, such as Ett|tt|ttL (E embedding, t layer, L loss)",
        json_schema_extra=unit("-"),
    )
    expert_model_parallel_size: int = Field(
        default=1,
        ge=1,
        description="Ranks that share out the FFN experts",
        json_schema_extra=unit("ranks"),
    )
    expert_tensor_parallel_size: int | None = Field(
        default=None,
        ge=1,
        description="Ranks that split each FFN expert; null means 1",
        json_schema_extra=unit("ranks"),
    )
    context_parallel_size: int = Field(
        default=1,
        ge=1,
        description="Ranks that split the sequence",
        json_schema_extra=unit("ranks"),
    )
    sequence_parallel: bool = Field(
        default=False,
        description="Split norms and the residual stream over the tensor-parallel ranks",
        json_schema_extra=unit("-"),
    )
    use_distributed_optimizer: bool = Field(
        default=True,
        description="Shard the optimizer state over the data-parallel ranks",
        json_schema_extra=unit("-"),
    )
    overlap_grad_reduce: bool = Field(
        default=False,
        description="Reduce gradients during the backward pass",
        json_schema_extra=unit("-"),
    )
    overlap_param_gather: bool = Field(
        default=False,
        description="Gather parameters during the forward pass",
        json_schema_extra=unit("-"),
    )
    overlap_moe_expert_parallel_comm: bool = Field(
        default=False,
        description="Move the tokens of one micro-batch while another one's layer computes "
        "(megatron-core's combined schedule of forward and backward)",
        json_schema_extra=unit("-"),
    )
    delay_wgrad_compute: bool = Field(
        default=False,
        description="In the combined schedule: compute gradients of weights after those of "
        "activations are on their way, so that more work hides what travels",
        json_schema_extra=unit("-"),
    )

    high_priority_stream_groups: list[Literal["tp", "cp", "dp_cp", "pp", "ep", "ep_dp"]] = Field(
        default=[],
        description="Process groups, by megatron-core's names, whose NCCL kernels start before "
        "others that wait for the GPU",
        json_schema_extra=unit("-"),
    )

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that split each FFN expert, the default resolved."""
        return self.expert_tensor_parallel_size or 1

    @property
    def uses_sequence_parallel(self) -> bool:
        """Whether sequence parallelism has an effect.

        megatron-core refuses the flag without tensor parallelism, so it gets this value.
        """
        return self.sequence_parallel and self.tensor_model_parallel_size > 1
