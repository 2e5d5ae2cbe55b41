"""Section `distillation`: a frozen teacher whose predictions the model learns with the text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moepp_megatron.config.schema.section import PathText, Section, Unit


class DistillationSection(Section):
    """The teacher, and how much its predictions count."""

    teacher: Annotated[PathText | None, Unit("-"), Field(min_length=1)] = None
    """Checkpoint folder or run whose model is the teacher; null trains without one"""
    weight: Annotated[float, Unit("1"), Field(ge=0.0)] = 1.0
    """Weight of the divergence from the teacher in the loss; 0 only measures it"""
    divergence: Annotated[Literal["forward_kl", "reverse_kl"], Unit("-")] = "forward_kl"
    """KL(teacher || model), which covers all that the teacher does, or KL(model || teacher), which
    keeps to what it finds likely"""
    text_weight: Annotated[float, Unit("1"), Field(ge=0.0)] = 1.0
    """Weight of the language-model loss in the loss, with a teacher"""
    temperature: Annotated[float, Unit("1"), Field(gt=0.0)] = 1.0
    """Divides the logits of both models; the divergence is multiplied by its square"""
    top_k: Annotated[int | None, Unit("tokens"), Field(ge=2)] = None
    """Compare only this many likeliest tokens of the teacher, with probabilities that sum to 1 in
    both models; null compares all"""
