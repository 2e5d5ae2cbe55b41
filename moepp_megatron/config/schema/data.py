"""Section `data`: the prepared corpus, and blends of several."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from moepp_megatron.config.errors import Problem
from moepp_megatron.config.plugins import Plugin
from moepp_megatron.config.rows import each, no_effect_where, refuse, table
from moepp_megatron.config.schema.section import ConfigPath, Section, Unit

if TYPE_CHECKING:
    from moepp_megatron.config.schema import Config


DEFAULT_SPLIT = "98,2,0"
"""`data.split` of a corpus that has none of its own."""


class BlendPart(Section):
    """One folder of a blend."""

    path: ConfigPath
    """Folder or prefix, as data.path"""
    weight: Annotated[float, Unit("1", ge=0)]
    """Share of the samples, before division by the sum of the blend's weights"""


def _blends(config: Config) -> Iterator[tuple[str, Sequence[BlendPart]]]:
    if config.data.blend:
        yield "data.blend", config.data.blend
    for index, stage in enumerate(config.data.stages):
        yield f"data.stages[{index}].blend", stage.blend


def _blends_name_a_folder_once(config: Config) -> Iterator[Problem]:
    """Two weights of one folder would be one, in one order of its samples."""
    rule = "must be another folder than those before it"
    remedy = "add its weight to that of the first"
    for name, parts in _blends(config):
        real = [os.path.realpath(part.path) for part in parts]
        for index, path in enumerate(real):
            if path in real[:index]:
                yield Problem(f"{name}[{index}].path", str(parts[index].path), rule, remedy)


def parse_split(text: str) -> tuple[float, float, float] | None:
    """Weights of `train,validation,test`, or None unless they are three numbers of 0 or more."""
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    if len(weights) != 3 or any(not math.isfinite(w) or w < 0 for w in weights):
        return None
    return weights[0], weights[1], weights[2]


def _split_has_three_parts(config: Config) -> Iterator[Problem]:
    """Three weights, something to train on, and something to validate on if that is asked for."""
    text, evaluated = config.data.split, config.training.eval_iters
    weights = parse_split(text) if text is not None else (1.0, 1.0, 1.0)
    remedy = f"use '{DEFAULT_SPLIT}'"
    if weights is None:
        rule = "must be three numbers of 0 or more, separated by commas: train, validation, test"
    elif weights[0] <= 0:
        rule = "must leave something to train on"
    elif weights[1] <= 0 and evaluated > 0 and not config.data.validation:
        rule = f"must leave something to validate on for training.eval_iters ({evaluated})"
        remedy += ", name sets in data.validation, or set training.eval_iters to 0"
    else:
        return
    yield Problem("data.split", text, rule, remedy)


class EngineDataSection(Section):
    """The prepared corpus."""

    path: ConfigPath | None = None
    """Folder written by `moepp data prepare`, or the prefix of Megatron's .bin and .idx; null where
    data.blend names several, or no data is read"""
    blend: list[BlendPart] = []
    """Folders that are trained on together, instead of data.path"""
    cache: ConfigPath | None = None
    """Folder for the order of samples, which all ranks must see; null: cache/ in the data folder"""
    tokenizer: ConfigPath | None = None
    """Tokenizer file; null takes tokenizer.json in the (first) data folder"""
    dataset: Literal["gpt"] | Annotated[str, Plugin("datasets")] = "gpt"
    """Dataset that samples documents; gpt is megatron-core's, which shuffles documents and cuts
    them into sequences"""
    split: Annotated[str | None, Unit("1")] = None
    """Weights of the train, validation and test parts by documents, separated by commas; null takes
    the corpus's own (whole packages of the built-in one) or 98,2,0"""
    reset_attention_mask: bool = False
    """Attention stays within documents; must be true for conversations (`moepp data prepare
    --chat`)"""
    reset_position_ids: bool = False
    """Positions start at 0 in every document; changes metrics by position only, because rotary
    embeddings depend on distances"""
    eod_mask_loss: bool = False
    """No loss where the input is the end-of-document token"""
    num_workers: Annotated[int, Unit("processes", ge=0)] = 0
    """Data loader processes per rank; 0 loads in the training process"""

    engine_defaults = {"stages": (), "validation": {}}
    megatron_flags: ClassVar[str] = (
        "split num-workers reset-position-ids:true reset-attention-mask:true eod-mask-loss:true"
    )
    own_rules = table(
        _split_has_three_parts,
        refuse(
            "data.blend",
            "not data.path null and data.blend",
            "must be empty where data.path ({data.path!s}) is set",
            "set data.path to null, or data.blend to []",
            value=lambda c: [str(part.path) for part in c.data.blend],
        ),
        each(
            lambda c: [(name, [part.weight for part in parts]) for name, parts in _blends(c)],
            lambda weights: sum(weights) <= 0,
            "must have at least one folder with a weight above 0",
            "use [{{path: DIR, weight: 1}}]",
        ),
        _blends_name_a_folder_once,
    )
    excludes = table(
        (
            "data.reset_attention_mask",
            "training.cuda_graphs",
            "a graph's inputs are of fixed sizes, without documents or padding",
        ),
    )
    no_effect = table(
        no_effect_where(
            "not data.reset_attention_mask",
            "on attention, which depends only on distances; only metrics by position change",
            "data.reset_position_ids",
            "set data.reset_attention_mask to true, or leave it out",
        ),
    )
