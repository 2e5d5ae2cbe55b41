"""The request of `moepp inspect`, checked before anything heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moepp_megatron.config import Config, ConfigError, load_config
from moepp_megatron.data.token_classes import Language, language_of, token_classes
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.experts import LOCAL_COUNTS, ExpertCounts
from moepp_megatron.file_names import CONFIG_FILE
from moepp_megatron.interop.score_request import ScoreRequest
from moepp_megatron.training.checkpoint import find_checkpoint
from moepp_megatron.training.checkpoint.progress import read_record
from moepp_megatron.training.generate_request import checkpoint_tokenizer
from moepp_megatron.training.inference_settings import inference_override
from moepp_megatron.workbench.inspection.tags import Tagger, read_tags, run_tagger, token_tags
from moepp_megatron.workbench.inspection.text import TokenizedText, read_text, tokenize, windows

_DEFAULT_MAX_TOKENS = 16_384


@dataclass(frozen=True)
class InspectedModel:
    """One checkpoint to run.

    Attributes:
        label: Its name on the page.
        facts: Short descriptions.
        experts: Experts of one MoE layer, by kind.
        layers: Numbers of the transformer layers that are MoE layers, from 1.
        balanced_share: FFN share of all selections under perfect balance, or the budget's.
        scoring: Its windows and layout.
    """

    label: str
    facts: tuple[str, ...]
    experts: ExpertCounts
    layers: tuple[int, ...]
    balanced_share: float
    scoring: ScoreRequest


@dataclass(frozen=True)
class InspectRequest:
    """A checked request.

    Attributes:
        classes: [N] int64 indices into `token_classes.CLASSES`.
        tags: Part of speech of each token, or None for a token without; None without any tags.
        window: Length of a window in tokens.
        models: One checkpoint, or two to compare.
        out: Page to write.
        json: JSON file to write, or None.
        notices: Notes for the user.
    """

    text: TokenizedText
    language: Language
    classes: np.ndarray
    tags: list[str | None] | None
    window: int
    models: list[InspectedModel]
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
        against: Path | None = None,
        json: Path | None = None,
        language: Language = "auto",
        pos_tags: Path | None = None,
        tagger: Tagger | None = None,
        max_tokens: int = _DEFAULT_MAX_TOKENS,
    ) -> InspectRequest:
        """Check a request.

        Args:
            checkpoint: A checkpoint folder or a run.
            text: File to read.
            out: Page to write.
            overrides: Settings `parallel.key=value` or `precision.key=value`, for every model.
            world_size: Ranks.
            against: A second checkpoint or run, to compare with the first.
            json: JSON file to write.
            language: `python` has keywords and identifiers, `text` has not.
            pos_tags: File of parts of speech (`tags.read_tags`).
            tagger: Package that tags parts of speech instead.
            max_tokens: Tokens to read at most.

        Raises:
            ConfigError: If the request is wrong.
            UnfitError: If the tagger is not installed.
        """
        for override in overrides:
            inference_override(override)
        if pos_tags is not None and tagger is not None:
            raise ConfigError(
                f"--pos-tags ({pos_tags}) and --tagger ({tagger}) must not both be given; leave "
                "one out"
            )
        for name, path in (("--out", out), ("--json", json)):
            _check_writable(name, path)
        checkpoints = [
            _LoadedCheckpoint.of(path) for path in (checkpoint, against) if path is not None
        ]
        content, more = read_text(text, max_tokens)
        tokenized = [
            tokenize(loaded.tokenizer, content, text.name, max_tokens) for loaded in checkpoints
        ]
        if against is not None:
            _check_same_tokens(against, *tokenized)
        first = tokenized[0]
        is_cut = first.is_cut or more
        window = min(len(first), *(loaded.config.model.seq_length for loaded in checkpoints))
        models = [
            _model(loaded, windows(tokens, window, loaded.tokenizer.eod), overrides, world_size)
            for loaded, tokens in zip(checkpoints, tokenized, strict=True)
        ]
        tags = _tags(first, is_cut, pos_tags, tagger)
        language = language_of(text, language)
        classes = token_classes(first.text, first.spans.tolist(), language)
        notices = _notices(models, first, is_cut, window)
        return cls(first, language, classes, tags, window, models, out, json, notices)


class _LoadedCheckpoint(NamedTuple):
    """A checkpoint that can be inspected: its folder, its configuration, its tokenizer."""

    folder: Path
    config: Config
    tokenizer: Tokenizer

    @classmethod
    def of(cls, checkpoint: Path) -> _LoadedCheckpoint:
        folder = find_checkpoint(checkpoint)
        config = load_config(folder / CONFIG_FILE)
        _check_kinds(folder, config)
        return cls(folder, config, checkpoint_tokenizer(folder, config))


def _check_writable(name: str, path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{name} ({path}) must be a file to write, and is a folder; name one")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise ConfigError(
            f"{name} ({path}) must be in a folder that is there and writable; make {path.parent}"
        )


def _check_kinds(folder: Path, config: Config) -> None:
    moe = config.moe
    if moe.num_zero_computation_experts == 0:
        raise ConfigError(
            f"checkpoint ({folder}) must have zero-computation experts ({LOCAL_COUNTS} "
            "is 0): every token takes "
            f"{moe.router_topk} FFN experts in every layer, so there is nothing to distinguish; "
            "name a MoE++ checkpoint"
        )


def _check_same_tokens(against: Path, first: TokenizedText, second: TokenizedText) -> None:
    if np.array_equal(first.spans, second.spans):
        return
    shorter = min(len(first), len(second))
    differ = (first.spans[:shorter] != second.spans[:shorter]).any(axis=1)
    index = int(differ.argmax()) if differ.any() else shorter - 1
    pieces = [repr(text.pieces[index]) for text in (first, second)]
    raise ConfigError(
        f"--against ({against}) must cut the text into the same tokens as the first checkpoint, "
        f"but token {index} is {pieces[1]} where the first has {pieces[0]}; compare checkpoints "
        "that were trained with one tokenizer"
    )


def _model(
    checkpoint: _LoadedCheckpoint, input_ids: np.ndarray, overrides: Sequence[str], world_size: int
) -> InspectedModel:
    folder, config, _ = checkpoint
    moe = config.moe
    pattern = moe.moe_layer_pattern(config.model.num_layers)
    layers = tuple(number for number, is_moe in enumerate(pattern, start=1) if is_moe)
    target = moe.budget.target_ffn_per_token
    facts = (
        # Two runs may have one name; the end of a long path distinguishes them.
        "/".join(folder.parts[-3:]),
        f"{len(layers)} MoE layers, hidden {config.model.hidden_size}",
        f"{moe.summary} experts, top-{moe.router_topk}",
        f"tau {moe.tau:g}" if target is None else f"budget {target:g} FFN experts per token",
    )
    scoring = ScoreRequest.of(folder, config, input_ids, overrides, world_size)
    return InspectedModel(_label(folder, config), facts, moe.counts, layers, moe.ffn_share, scoring)


def _label(folder: Path, config: Config) -> str:
    try:
        record = read_record(folder)
    except ValueError:
        record = None
    step = "" if record is None else f", step {record.progress.step:,}"
    return f"{config.run.name}{step}"


def _tags(
    text: TokenizedText, is_cut: bool, pos_tags: Path | None, tagger: Tagger | None
) -> list[str | None] | None:
    if pos_tags is not None:
        return token_tags(text.spans.tolist(), read_tags(pos_tags, text.text, is_cut))
    if tagger is not None:
        return token_tags(text.spans.tolist(), run_tagger(tagger, text.text))
    return None


def _notices(
    models: list[InspectedModel], text: TokenizedText, is_cut: bool, window: int
) -> list[str]:
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
    for model in models:
        # One sequence padded for the layout, or what the model ignores here.
        notices += [notice for notice in model.scoring.notices if notice not in notices]
    return notices
