"""Entries of `data.blend` and `data.stages`."""

from __future__ import annotations

from pydantic import Field

from moepp_megatron.config.schema.section import ConfigPath, Section, unit


class BlendPart(Section):
    """One folder of a blend."""

    path: ConfigPath = Field(
        description="Folder or prefix, as data.path",
        json_schema_extra=unit("-"),
    )
    weight: float = Field(
        ge=0,
        description="Share of the samples, before division by the sum of the blend's weights",
        json_schema_extra=unit("1"),
    )


class DataStage(Section):
    """One stage: a blend, and where it begins. A folder continues where it was left."""

    from_step: int | None = Field(
        default=None,
        ge=1,
        description="Steps that the run has taken when the stage begins, refused batches included",
        json_schema_extra=unit("steps"),
    )
    from_tokens: float | None = Field(
        default=None,
        gt=0,
        description="The same in tokens, rounded up to a whole step; instead of from_step",
        json_schema_extra=unit("tokens"),
    )
    blend: list[BlendPart] = Field(
        description="Folders that are trained on together",
        json_schema_extra=unit("-"),
    )
