"""Section `routes`: the experts that tokens take, written to files or taken from them."""

from typing import Annotated, Any

from moepp_megatron.config.rows import group, no_effect_where, refuse
from moepp_megatron.config.schema.section import PathText, Section, Unit


class RoutesSection(Section):
    """Router replay."""

    record: PathText | None = None
    """Folder for the experts that each token of a batch selects: from_sample_00000000.npz and so
    on, by the batch's first sample; null is off"""
    replay: PathText | None = None
    """Folder with such files, one for every batch, whose experts the routers select, with gates
    from their own logits; null lets them select"""
    steps: Annotated[int | None, Unit("steps", ge=1)] = None
    """Record this many steps, from the first one of this start; null: all"""

    @property
    def enabled(self) -> bool:
        """True if routers record or repeat selections."""
        return self.record is not None or self.replay is not None

    def transformer_fields(self) -> dict[str, Any]:
        """Switch on megatron-core's own place for given routes."""
        return {"moe_enable_routing_replay": self.enabled}

    removed = {"trace": (None, "use routes.record, whose files have the same experts")}
    own_rules = (
        group(
            "not routes.replay null",
            refuse(
                "routes.replay",
                lambda c: c.routes.replay == c.routes.record,
                "must be another folder than routes.record",
                "write to another one",
            ),
            refuse(
                "routes.replay",
                lambda c: c.moe.share_controller != "none" or c.moe.bias_update_rate > 0,
                "must be null with a controller of selections (moe.budget.controller, "
                "moe.bias_update_rate): given routes do not follow it",
                "leave it out, or use moe.budget.controller=none and moe.bias_update_rate=0",
            ),
        ),
    )
    excludes = tuple(
        (f"routes.{name}", other, reason)
        for other, reason in (
            ("training.cuda_graphs", "a graph would repeat the routes of its capture"),
            ("megatron.moe_router_fusion", "its kernel can repeat no experts"),
            ("model.mtp_num_layers", "routes of these layers have no place in the file"),
            (
                "parallel.overlap_moe_expert_parallel_comm",
                "its layers are not run chunk by chunk",
            ),
        )
        for name in ("record", "replay")
    )
    no_effect = (
        no_effect_where(
            "routes.record null",
            "without routes.record",
            "routes.steps",
            "set it",
        ),
    )
    uses = "record=output"
    of_one_run = "record replay steps"
