"""Rules of the section `distillation`."""

from __future__ import annotations

from moepp_megatron.config.rules.rows import Rule, refuse
from moepp_megatron.config.schema import Config


def _nothing_is_learnt(config: Config) -> bool:
    settings = config.distillation
    return settings.teacher is not None and settings.weight == settings.text_weight == 0


RULES: tuple[Rule, ...] = (
    refuse("distillation.text_weight", _nothing_is_learnt,
        "must be above 0 with distillation.weight 0: nothing would be learnt",
        "leave one of them out"),
    refuse("distillation.top_k", lambda c: (c.distillation.top_k or 0) > c.model.vocab_size,
        "must be at most model.vocab_size ({model.vocab_size})", "use fewer, or null for all"),
)  # fmt: skip
