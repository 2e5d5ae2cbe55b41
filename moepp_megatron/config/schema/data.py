"""Section `data`: the prepared corpus, and blends of several."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from moepp_megatron.config.blends import first_step
from moepp_megatron.config.plugins import Plugin
from moepp_megatron.config.problem import Problem
from moepp_megatron.config.rows import each, entries, group, no_effect_where, refuse
from moepp_megatron.config.schema.section import ConfigPath, Section, Unit
from moepp_megatron.config.split import parse_split

if TYPE_CHECKING:
    from moepp_megatron.config.schema import Config


class BlendPart(Section):
    """One folder of a blend."""

    path: ConfigPath
    """Folder or prefix, as data.path"""
    weight: Annotated[float, Unit("1"), Field(ge=0)]
    """Share of the samples, before division by the sum of the blend's weights"""


class DataStage(Section):
    """One stage: a blend, and where it begins. A folder continues where it was left."""

    from_step: Annotated[int | None, Unit("steps"), Field(ge=1)] = None
    """Steps that the run has taken when the stage begins, refused batches included"""
    from_tokens: Annotated[float | None, Unit("tokens"), Field(gt=0)] = None
    """The same in tokens, rounded up to a whole step; instead of from_step"""
    blend: list[BlendPart]
    """Folders that are trained on together"""


def _blends(config: Config) -> Iterator[tuple[str, Sequence[BlendPart]]]:
    if config.data.blend:
        yield "data.blend", config.data.blend
    for index, stage in enumerate(config.data.stages):
        yield f"data.stages[{index}].blend", stage.blend


def _weights(config: Config) -> Iterator[tuple[str, list[float]]]:
    for name, parts in _blends(config):
        yield name, [part.weight for part in parts]


def _blends_name_a_folder_once(config: Config) -> Iterator[Problem]:
    """Two weights of one folder would be one, in one order of its samples."""
    rule = "must be another folder than those before it"
    remedy = "add its weight to that of the first"
    for name, parts in _blends(config):
        real = [os.path.realpath(part.path) for part in parts]
        for index, path in enumerate(real):
            if path in real[:index]:
                yield Problem(f"{name}[{index}].path", str(parts[index].path), rule, remedy)


def _begins(config: Config) -> Iterator[tuple[str, dict[str, float | None]]]:
    for index, stage in enumerate(config.data.stages):
        begins = {"from_step": stage.from_step, "from_tokens": stage.from_tokens}
        yield f"data.stages[{index}]", begins


def _stages_follow_each_other(config: Config) -> Iterator[Problem]:
    """Each stage has steps of its own; a stage that never begins is not wrong, but ignored."""
    before = 0
    for index, stage in enumerate(config.data.stages):
        key = "from_step" if stage.from_step is not None else "from_tokens"
        value, begins = getattr(stage, key), first_step(config, stage)
        if value is not None and begins <= before:
            rule = f"must begin after step {before}, where the blend before it does"
            yield Problem(f"data.stages[{index}].{key}", value, rule, "put the stages in order")
        before = begins


def _split_has_three_parts(config: Config) -> Iterator[Problem]:
    """Three weights, something to train on, and something to validate on if that is asked for."""
    text, evaluated = config.data.split, config.training.eval_iters
    weights = parse_split(text) if text is not None else (1.0, 1.0, 1.0)
    remedy = "use '98,2,0'"
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


class DataSection(Section):
    """The prepared corpus."""

    path: ConfigPath | None = None
    """Folder written by `moepp data prepare`, or the prefix of Megatron's .bin and .idx; null where
    data.blend names several, or no data is read"""
    blend: list[BlendPart] = []
    """Folders that are trained on together, instead of data.path"""
    stages: list[DataStage] = []
    """Blends that replace the one before at a step or a number of tokens, in order"""
    validation: dict[str, ConfigPath] = {}
    """Further validation sets, {name: folder}, each with its own loss: the validation part of a
    folder that is trained on, all documents of any other"""
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
    num_workers: Annotated[int, Unit("processes"), Field(ge=0)] = 0
    """Data loader processes per rank; 0 loads in the training process"""

    own_rules = (
        _split_has_three_parts,
        refuse(
            "data.blend",
            lambda c: c.data.path is not None and c.data.blend,
            "must be empty where data.path ({data.path!s}) is set",
            "set data.path to null, or data.blend to []",
            value=lambda c: [str(part.path) for part in c.data.blend],
        ),
        refuse(
            "data.stages",
            lambda c: c.data.stages and c.data.path is None and not c.data.blend,
            "must come with the data of the steps before the first of them",
            "set data.path or data.blend",
            value=lambda c: f"{len(c.data.stages)} stages",
        ),
        each(
            _weights,
            lambda weights: sum(weights) <= 0,
            "must have at least one folder with a weight above 0",
            "use [{{path: DIR, weight: 1}}]",
        ),
        _blends_name_a_folder_once,
        each(
            _begins,
            lambda begins: (begins["from_step"] is None) == (begins["from_tokens"] is None),
            "must have one of from_step and from_tokens",
            "give one of them",
        ),
        # Where a stage begins is counted in batches.
        group(
            lambda c: c.data.stages,
            refuse(
                "training.batch_ramp",
                lambda c: c.training.batch_ramp is not None,
                "must be null with data.stages, which begin after a number of equal batches",
                "leave out one of the two",
            ),
        ),
        _stages_follow_each_other,
        # They name metrics, in records and in what others read.
        each(
            entries("data.validation"),
            lambda name: not name.strip() or not name.isprintable(),
            "must have names of printable characters",
            "use a word, such as {{law: DIR}}",
        ),
    )
    excludes = (
        (
            "data.reset_attention_mask",
            "training.cuda_graphs",
            "a graph's inputs are of fixed sizes, without documents or padding",
        ),
    )
    no_effect = (
        no_effect_where(
            lambda c: not c.data.reset_attention_mask,
            "on attention, which depends only on distances; only metrics by position change",
            "data.reset_position_ids",
            "set data.reset_attention_mask to true, or leave it out",
        ),
    )
