"""Rules of the section `data`: blends, stages and validation sets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from moepp_megatron.config.blends import first_step
from moepp_megatron.config.problem import Problem
from moepp_megatron.config.rows import Rule, each, entries, group, refuse
from moepp_megatron.config.schema import BlendPart, Config


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


RULES: tuple[Rule, ...] = (
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
