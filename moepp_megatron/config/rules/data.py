"""Rules of the section `data`: blends, stages and validation sets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from moepp_megatron.config.blends import first_step
from moepp_megatron.config.problem import Problem
from moepp_megatron.config.schema import BlendPart, Config


def _path_or_blend(config: Config) -> Iterator[Problem]:
    """One place says what is trained on; a file and its base may name both by mistake."""
    data = config.data
    if data.path is not None and data.blend:
        yield Problem(
            "data.blend",
            [str(part.path) for part in data.blend],
            f"must be empty where data.path ({data.path}) is set",
            "set data.path to null, or data.blend to []",
        )
    elif data.stages and data.path is None and not data.blend:
        yield Problem(
            "data.stages",
            f"{len(data.stages)} stages",
            "must come with the data of the steps before the first of them",
            "set data.path or data.blend",
        )


def _blends(config: Config) -> Iterator[tuple[str, Sequence[BlendPart]]]:
    if config.data.blend:
        yield "data.blend", config.data.blend
    for index, stage in enumerate(config.data.stages):
        yield f"data.stages[{index}].blend", stage.blend


def _blends_have_weight(config: Config) -> Iterator[Problem]:
    """Shares are weights over their sum."""
    for name, parts in _blends(config):
        if sum(part.weight for part in parts) <= 0:
            yield Problem(
                name,
                [part.weight for part in parts],
                "must have at least one folder with a weight above 0",
                "use [{path: DIR, weight: 1}]",
            )


def _blends_name_a_folder_once(config: Config) -> Iterator[Problem]:
    """Two weights of one folder would be one, in one order of its samples."""
    for name, parts in _blends(config):
        real = [os.path.realpath(part.path) for part in parts]
        for index, path in enumerate(real):
            if path in real[:index]:
                yield Problem(
                    f"{name}[{index}].path",
                    str(parts[index].path),
                    "must be another folder than those before it",
                    "add its weight to that of the first",
                )


def _stages_say_when(config: Config) -> Iterator[Problem]:
    """A stage begins at a step or at a number of tokens."""
    for index, stage in enumerate(config.data.stages):
        if (stage.from_step is None) == (stage.from_tokens is None):
            yield Problem(
                f"data.stages[{index}]",
                {"from_step": stage.from_step, "from_tokens": stage.from_tokens},
                "must have one of from_step and from_tokens",
                "give one of them",
            )


def _stages_need_one_batch_size(config: Config) -> Iterator[Problem]:
    """Where a stage begins is counted in batches."""
    if config.data.stages and config.training.batch_ramp is not None:
        yield Problem(
            "training.batch_ramp",
            config.training.batch_ramp,
            "must be null with data.stages, which begin after a number of equal batches",
            "leave out one of the two",
        )


def _stages_follow_each_other(config: Config) -> Iterator[Problem]:
    """Each stage has steps of its own; a stage that never begins is not wrong, but ignored."""
    before = 0
    for index, stage in enumerate(config.data.stages):
        key = "from_step" if stage.from_step is not None else "from_tokens"
        begins = first_step(config, stage)
        if getattr(stage, key) is not None and begins <= before:
            yield Problem(
                f"data.stages[{index}].{key}",
                getattr(stage, key),
                f"must begin after step {before}, where the blend before it does",
                "put the stages in order",
            )
        before = begins


def _validation_sets_have_names(config: Config) -> Iterator[Problem]:
    """They name metrics, in records and in what others read."""
    for name in config.data.validation:
        if not name.strip() or not name.isprintable():
            yield Problem(
                "data.validation",
                name,
                "must have names of printable characters",
                "use a word, such as {law: DIR}",
            )


RULES = (
    _path_or_blend,
    _blends_have_weight,
    _blends_name_a_folder_once,
    _stages_say_when,
    _stages_need_one_batch_size,
    _stages_follow_each_other,
    _validation_sets_have_names,
)
