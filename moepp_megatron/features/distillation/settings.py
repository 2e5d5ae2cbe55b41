"""Section `distillation`: a frozen teacher whose predictions the model learns with the text."""

from typing import Annotated, Literal

from moepp_megatron.config.rows import no_effect_without, refuse
from moepp_megatron.config.schema.section import PathText, Section, Unit


class DistillationSection(Section):
    """The teacher, and how much its predictions count."""

    teacher: PathText | None = None
    """Checkpoint folder or run whose model is the teacher; null trains without one"""
    weight: Annotated[float, Unit("1", ge=0.0)] = 1.0
    """Weight of the divergence from the teacher in the loss; 0 only measures it"""
    divergence: Literal["forward_kl", "reverse_kl"] = "forward_kl"
    """KL(teacher || model), which covers all that the teacher does, or KL(model || teacher), which
    keeps to what it finds likely"""
    text_weight: Annotated[float, Unit("1", ge=0.0)] = 1.0
    """Weight of the language-model loss in the loss, with a teacher"""
    temperature: Annotated[float, Unit("1", gt=0.0)] = 1.0
    """Divides the logits of both models; the divergence is multiplied by its square"""
    top_k: Annotated[int | None, Unit("tokens", ge=2)] = None
    """Compare only this many likeliest tokens of the teacher, with probabilities that sum to 1 in
    both models; null compares all"""

    own_rules = (
        refuse(
            "distillation.text_weight",
            "not distillation.teacher null and not distillation.weight "
            "and not distillation.text_weight",
            "must be above 0 with distillation.weight 0: nothing would be learnt",
            "leave one of them out",
        ),
        refuse(
            "distillation.top_k",
            lambda c: (c.distillation.top_k or 0) > c.model.vocab_size,
            "must be at most model.vocab_size ({model.vocab_size})",
            "use fewer, or null for all",
        ),
    )
    excludes = (
        (
            "model.mtp_num_layers",
            "distillation.teacher",
            "a teacher's logits are those of the next token",
        ),
        (
            "data.reset_attention_mask",
            "distillation.teacher",
            "a teacher is given no mask of documents",
        ),
    )
    uses = "teacher=checkpoint"
    no_effect = (
        no_effect_without(
            "distillation.teacher",
            "distillation.weight distillation.text_weight distillation.temperature "
            "distillation.top_k distillation.divergence",
            "name one",
        ),
    )
