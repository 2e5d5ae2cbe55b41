"""Settings of static rows in the section `moe`."""

from typing import Annotated

from moepp_megatron.config.rows import Condition, group, refuse, table
from moepp_megatron.config.schema.moe import EngineMoESection
from moepp_megatron.config.schema.section import Unit

# Where `moe.static_rows` cannot be honoured: condition, what it is with the reason, remedy.
_DYNAMIC_ONLY: tuple[tuple[Condition, str, str], ...] = (
    (
        "moe.is_vanilla",
        "megatron-core's vanilla MoE layer, which has no static path here",
        "set moe.gating_residual to true or add zero-computation experts",
    ),
    (
        "not moe.dispatcher alltoall",
        "moe.dispatcher {moe.dispatcher}, which reads its sizes on the host",
        "moe.dispatcher alltoall",
    ),
    (
        "not parallel.expert_tensor_size 1",
        "experts over tensor-parallel ranks, whose rows are gathered by their number",
        "parallel.expert_tensor_parallel_size 1",
    ),
    (
        "parallel.overlap_moe_expert_parallel_comm",
        "parallel.overlap_moe_expert_parallel_comm, which frees what is sent at once",
        "parallel.overlap_moe_expert_parallel_comm false",
    ),
    (
        "precision.fp8",
        "precision.fp8: Transformer Engine reads the rows of each expert on the host",
        "precision.fp8 null",
    ),
    (
        lambda c: {"expert_fc1", "moe_act"} & {*c.megatron.offload_modules},
        "megatron.offload_modules that Transformer Engine's experts have",
        "leave expert_fc1 and moe_act out",
    ),
    (
        "training.profile_steps",
        "training.profile_steps, whose ranges are those of the dynamic path",
        "training.profile_steps []",
    ),
)


class StaticRowsSettings(EngineMoESection):  # type: ignore[misc]  # as EngineMoESection
    """The section `moe` with static rows."""

    static_rows: Annotated[float | None, Unit("1", gt=0.0, le=64.0)] = None
    """Size of the buffer of FFN rows, over the mean number of rows that moe.budget or moe.tau
    gives: no layer waits for the host, and a step that overflows runs again without. null: as many
    rows as are selected"""

    @property
    def static_rows_per_selection(self) -> float | None:
        """FFN rows of a rank for each selection of its tokens; None without static rows."""
        return None if self.static_rows is None else self.static_rows * self.largest_ffn_share

    own_rules = table(
        group(
            "not moe.static_rows null",
            *(
                refuse(
                    "moe.static_rows", wrong, f"must be null with {what}", f"use null, or {remedy}"
                )
                for wrong, what, remedy in _DYNAMIC_ONLY
            ),
        ),
    )
