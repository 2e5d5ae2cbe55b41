"""Entries of `data.blend` and `data.stages`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moepp_megatron.config.schema.section import ConfigPath, Section, Unit


class BlendPart(Section):
    """One folder of a blend."""

    path: Annotated[ConfigPath, Unit("-")]
    """Folder or prefix, as data.path"""
    weight: Annotated[float, Unit("1"), Field(ge=0)]
    """Share of the samples, before division by the sum of the blend's weights"""


class DataStage(Section):
    """One stage: a blend, and where it begins. A folder continues where it was left."""

    from_step: Annotated[int | None, Unit("steps"), Field(ge=1)] = None
    """Steps that the run has taken when the stage begins, refused batches included"""
    from_tokens: Annotated[float | None, Unit("tokens"), Field(gt=0)] = None
    """The same in tokens, rounded up to a whole step; instead of from_step"""
    blend: Annotated[list[BlendPart], Unit("-")]
    """Folders that are trained on together"""
