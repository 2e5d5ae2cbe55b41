"""Rules of the section `distillation`."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.schema import Config


def _teacher_predicts_one_token(config: Config) -> Iterator[Problem]:
    """A teacher says nothing of the tokens behind the next one."""
    if config.distillation.teacher is not None and config.model.mtp_num_layers:
        yield Problem(
            "model.mtp_num_layers",
            config.model.mtp_num_layers,
            "must be 0 with distillation.teacher, whose logits are those of the next token",
            "leave one of the two out",
        )


def _teacher_sees_what_the_model_sees(config: Config) -> Iterator[Problem]:
    """The teacher's forward pass is given tokens and positions."""
    if config.distillation.teacher is not None and config.data.reset_attention_mask:
        yield Problem(
            "data.reset_attention_mask",
            True,
            "must be false with distillation.teacher, which is given no mask of documents",
            "leave one of the two out",
        )


def _something_is_learnt(config: Config) -> Iterator[Problem]:
    """One of the two losses counts."""
    settings = config.distillation
    if settings.teacher is not None and settings.weight == settings.text_weight == 0:
        yield Problem(
            "distillation.text_weight",
            settings.text_weight,
            "must be above 0 with distillation.weight 0: nothing would be learnt",
            "leave one of them out",
        )


def _compared_tokens_exist(config: Config) -> Iterator[Problem]:
    """No more tokens are compared than there are."""
    top_k, vocabulary = config.distillation.top_k, config.model.vocab_size
    if top_k is not None and top_k > vocabulary:
        yield Problem(
            "distillation.top_k",
            top_k,
            f"must be at most model.vocab_size ({vocabulary})",
            "use fewer, or null for all",
        )


RULES = (
    _teacher_predicts_one_token,
    _teacher_sees_what_the_model_sees,
    _something_is_learnt,
    _compared_tokens_exist,
)
