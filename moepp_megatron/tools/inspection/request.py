"""The request of `moepp inspect`, checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moepp_megatron.config import Config, ConfigError, load_config
from moepp_megatron.data.token_classes import Language, language_of, token_classes
from moepp_megatron.experts import LOCAL_COUNTS, ExpertCounts
from moepp_megatron.file_names import CONFIG_FILE
from moepp_megatron.interop.score import ScoreRequest, checkpoint_tokenizer, text_of
from moepp_megatron.tools.inspection.text import CHARACTERS_A_TOKEN, TokenizedText
from moepp_megatron.training.checkpoint.files import SavedRecord
from moepp_megatron.training.checkpoint.find import find_checkpoint
from moepp_megatron.training.inference_settings import inference_override

_DEFAULT_MAX_TOKENS = 16_384


@dataclass(frozen=True)
class InspectedModel:
    """The checkpoint to run: `label` and `facts` for the page, and the experts of one MoE layer.

    `layers` are the numbers of the transformer layers that are MoE layers, from 1, `balanced_share`
    the FFN share of all selections under perfect balance, or the budget's, `scoring` its windows
    and layout.
    """

    label: str
    facts: tuple[str, ...]
    experts: ExpertCounts
    layers: tuple[int, ...]
    balanced_share: float
    scoring: ScoreRequest


@dataclass(frozen=True)
class InspectRequest:
    """A checked request; the page goes to `out`, and the JSON file, if there is one, to `json`.

    `classes` [N] are int64 indices into `token_classes.CLASSES`; a window has `window` tokens.
    """

    text: TokenizedText
    language: Language
    classes: np.ndarray
    window: int
    model: InspectedModel
    out: Path
    json: Path | None = None
    notices: list[str] = field(default_factory=list)

    @classmethod
    def read(
        cls,
        checkpoint: Path,
        text: Path,
        out: Path,
        overrides: Sequence[str] = (),
        world_size: int = 1,
        *,
        json: Path | None = None,
        language: Language = "auto",
        max_tokens: int = _DEFAULT_MAX_TOKENS,
    ) -> InspectRequest:
        """Check a request; ConfigError if it is wrong."""
        for override in overrides:
            inference_override(override)
        folder = find_checkpoint(checkpoint)
        config = load_config(folder / CONFIG_FILE)
        if config.moe.num_zero_computation_experts == 0:
            raise ConfigError(
                f"checkpoint ({folder}) must have zero-computation experts ({LOCAL_COUNTS} "
                "is 0): every token takes "
                f"{config.moe.router_topk} FFN experts in every layer, so there is nothing to "
                "distinguish; name a MoE++ checkpoint"
            )
        tokenizer = checkpoint_tokenizer(folder, config)
        content, more = text_of(text, max_tokens * CHARACTERS_A_TOKEN)
        tokens = TokenizedText.of(tokenizer, content, text.name, max_tokens)
        window = min(len(tokens), config.model.seq_length)
        input_ids = tokens.windows(window, tokenizer.eod)
        scoring = ScoreRequest.of(folder, config, input_ids, overrides, world_size)
        language = language_of(text, language)
        classes = token_classes(tokens.text, tokens.spans.tolist(), language)
        notices = _notices(scoring, tokens, tokens.is_cut or more, window)
        model = _model(folder, config, scoring)
        return cls(tokens, language, classes, window, model, out, json, notices)


def _model(folder: Path, config: Config, scoring: ScoreRequest) -> InspectedModel:
    moe = config.moe
    pattern = moe.moe_layer_pattern(config.model.num_layers)
    layers = tuple(number for number, is_moe in enumerate(pattern, start=1) if is_moe)
    target = moe.budget.target_ffn_per_token
    facts = (
        # The end of a long path says most.
        "/".join(folder.parts[-3:]),
        f"{len(layers)} MoE layers, hidden {config.model.hidden_size}",
        f"{moe.summary} experts, top-{moe.router_topk}",
        f"tau {moe.tau:g}" if target is None else f"budget {target:g} FFN experts per token",
    )
    label = config.run.name
    with suppress(ValueError):
        if (record := SavedRecord.read(folder)) is not None:
            label += f", step {record.progress.step:,}"
    return InspectedModel(label, facts, moe.counts, layers, moe.ffn_share, scoring)


def _notices(scoring: ScoreRequest, text: TokenizedText, is_cut: bool, window: int) -> list[str]:
    notices = []
    if is_cut:
        notices.append(
            f"the text is longer than {len(text):,} tokens (--max-tokens); the rest is left out"
        )
    if len(text) > window:
        notices.append(
            f"the text of {len(text):,} tokens is read in windows of {window} (model.seq_length), "
            "each without memory of the one before"
        )
    # One sequence padded for the layout, or what the model ignores here.
    return notices + [notice for notice in scoring.notices if notice not in notices]
