"""Section `routes`: the experts that tokens take, written to files or taken from them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moepp_megatron.config.schema.section import PathText, Section, Unit


class RoutesSection(Section):
    """Router replay, and traces of routing."""

    record: Annotated[PathText | None, Unit("-"), Field(min_length=1)] = None
    """Folder for the experts that each token of a batch selects: from_sample_00000000.npz and so
    on, by the batch's first sample; null is off"""
    replay: Annotated[PathText | None, Unit("-"), Field(min_length=1)] = None
    """Folder with such files, one for every batch, whose experts the routers select, with gates
    from their own logits; null lets them select"""
    trace: Annotated[PathText | None, Unit("-"), Field(min_length=1)] = None
    """Folder for router_trace_rankN.jsonl, the file of Megatron's `--moe-routing-trace-path`; null
    is off"""
    steps: Annotated[int | None, Unit("steps"), Field(ge=1)] = None
    """Record and trace this many steps, from the first one of this start; null: all"""

    @property
    def enabled(self) -> bool:
        """Whether routers record or repeat selections."""
        return any(each is not None for each in (self.record, self.replay, self.trace))


# For runs of a configuration that must not touch its files.
NO_ROUTES = tuple(f"routes.{name}=null" for name in RoutesSection.model_fields)
