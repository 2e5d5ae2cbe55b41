"""Section `distillation`: a frozen teacher whose predictions the model learns beside the text."""

from __future__ import annotations

from pydantic import Field

from moepp_megatron.config.schema.section import PathText, Section, unit


class DistillationSection(Section):
    """The teacher, and how much its predictions count."""

    teacher: PathText | None = Field(
        default=None,
        min_length=1,
        description="Checkpoint folder or run whose model is the teacher; null trains without one",
        json_schema_extra=unit("-"),
    )
    weight: float = Field(
        default=1.0,
        ge=0.0,
        description="Weight of the divergence from the teacher in the loss; 0 only measures it",
        json_schema_extra=unit("1"),
    )
    text_weight: float = Field(
        default=1.0,
        ge=0.0,
        description="Weight of the language-model loss in the loss, beside a teacher",
        json_schema_extra=unit("1"),
    )
    temperature: float = Field(
        default=1.0,
        gt=0.0,
        description="Divides the logits of both models; the divergence is multiplied by its square",
        json_schema_extra=unit("1"),
    )
    top_k: int | None = Field(
        default=None,
        ge=2,
        description="Compare only the teacher's so many likeliest tokens, their probabilities "
        "summing to 1 in both models; null compares all",
        json_schema_extra=unit("tokens"),
    )
