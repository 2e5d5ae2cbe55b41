"""Section `parallel`: how the model is laid out over ranks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moepp_megatron.config.schema.section import Section, Unit

# As in `moepp scale --layout`, and the setting.
DEGREES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}


class ParallelSection(Section):
    """Degrees of parallelism; names follow megatron-core's ModelParallelConfig."""

    tensor_model_parallel_size: Annotated[int, Unit("ranks"), Field(ge=1)] = 1
    """Ranks that split each layer"""
    pipeline_model_parallel_size: Annotated[int, Unit("ranks"), Field(ge=1)] = 1
    """Pipeline stages"""
    virtual_pipeline_model_parallel_size: Annotated[int | None, Unit("chunks"), Field(ge=2)] = None
    """Model chunks per pipeline rank (interleaved schedule); null: one"""
    pipeline_model_parallel_layout: Annotated[str | None, Unit("-")] = None
    """Layers per stage, such as Ett|tt|ttL (E embedding, t layer, L loss)"""
    expert_model_parallel_size: Annotated[int, Unit("ranks"), Field(ge=1)] = 1
    """Ranks that share out the FFN experts"""
    expert_tensor_parallel_size: Annotated[int | None, Unit("ranks"), Field(ge=1)] = None
    """Ranks that split each FFN expert; null means 1"""
    context_parallel_size: Annotated[int, Unit("ranks"), Field(ge=1)] = 1
    """Ranks that split the sequence"""
    sequence_parallel: Annotated[bool, Unit("-")] = False
    """Split norms and the residual stream over the tensor-parallel ranks"""
    use_distributed_optimizer: Annotated[bool, Unit("-")] = True
    """Shard the optimizer state over the data-parallel ranks"""
    overlap_grad_reduce: Annotated[bool, Unit("-")] = False
    """Reduce gradients during the backward pass"""
    overlap_param_gather: Annotated[bool, Unit("-")] = False
    """Gather parameters during the forward pass"""
    overlap_moe_expert_parallel_comm: Annotated[bool, Unit("-")] = False
    """Move the tokens of one micro-batch while another one's layer computes (megatron-core's
    combined schedule of forward and backward)"""
    delay_wgrad_compute: Annotated[bool, Unit("-")] = False
    """In the combined schedule: compute gradients of weights after those of activations are on
    their way, so that more work hides what travels"""

    high_priority_stream_groups: Annotated[
        list[Literal["tp", "cp", "dp_cp", "pp", "ep", "ep_dp"]], Unit("-")
    ] = []
    """Process groups, by megatron-core's names, whose NCCL kernels start before others that wait
    for the GPU"""

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that split each FFN expert, the default resolved."""
        return self.expert_tensor_parallel_size or 1

    @property
    def uses_sequence_parallel(self) -> bool:
        """True if sequence parallelism has an effect.

        megatron-core refuses the flag without tensor parallelism, so it gets this value.
        """
        return self.sequence_parallel and self.tensor_model_parallel_size > 1
