"""Rules of the section `slurm`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.schema import Config

# What Slurm's names and lists of names consist of, and how it writes durations.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:&|()\[\]*%+-]*")
_TIME = re.compile(r"(\d+-\d{1,2}(:\d{2}){0,2})|(\d+(:\d{2}){0,2})")


def _names_are_slurms(config: Config) -> Iterator[Problem]:
    """Names contain only characters that Slurm's names may have."""
    for key in ("partition", "account", "qos", "constraint", "exclude"):
        value = getattr(config.slurm, key)
        if value is not None and not _NAME.fullmatch(value):
            yield Problem(
                f"slurm.{key}",
                value,
                "must hold only letters, digits and _.,:&|()[]*%+-",
                "use a name that this cluster has, or null",
            )


def _time_limit_is_a_duration(config: Config) -> Iterator[Problem]:
    """The time limit is one of Slurm's forms."""
    time = config.slurm.time
    if time is not None and not _TIME.fullmatch(time):
        yield Problem(
            "slurm.time",
            time,
            "must be minutes, hours:minutes:seconds or days-hours:minutes:seconds",
            'write for example "4:00:00" or "2-00:00:00"',
        )


def _time_limit_leaves_time_to_train(config: Config) -> Iterator[Problem]:
    """A job is not asked to stop as soon as it starts."""
    slurm = config.slurm
    if slurm.time is not None and _TIME.fullmatch(slurm.time):
        limit = _seconds(slurm.time)
        # Slurm takes 0 for no limit.
        if 0 < limit <= slurm.signal_before_s:
            yield Problem(
                "slurm.signal_before_s",
                slurm.signal_before_s,
                f"must be below slurm.time ({slurm.time}, {limit} s)",
                "lower it, or raise the time limit",
            )


def _seconds(time: str) -> int:
    """A duration in one of Slurm's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _fewest_nodes_are_among_the_nodes(config: Config) -> Iterator[Problem]:
    """The minimum of nodes does not exceed the number of nodes that the job asks for."""
    slurm = config.slurm
    if slurm.min_nodes is not None and slurm.min_nodes > slurm.nodes:
        yield Problem(
            "slurm.min_nodes",
            slurm.min_nodes,
            f"must be at most slurm.nodes ({slurm.nodes})",
            f"use {slurm.nodes} or less, or null",
        )


def _container_has_an_image(config: Config) -> Iterator[Problem]:
    """A container needs an image, and an image needs a container runtime."""
    slurm = config.slurm
    if slurm.container != "none" and slurm.container_image is None:
        yield Problem(
            "slurm.container_image",
            None,
            f"must name an image for slurm.container ({slurm.container})",
            "name one, or use slurm.container none",
        )
    if slurm.container == "none" and slurm.container_image is not None:
        yield Problem(
            "slurm.container_image",
            slurm.container_image,
            "must come with slurm.container pyxis or apptainer",
            "set slurm.container, or leave the image out",
        )


def _options_are_options(config: Config) -> Iterator[Problem]:
    """Further options are long options on one line, each in one piece."""
    for option in config.slurm.options:
        if not option.startswith("--") or not option.isprintable():
            yield Problem(
                "slurm.options",
                option,
                "must be a long option of sbatch on one line",
                "write it as --name=value",
            )


def _mounts_are_pairs(config: Config) -> Iterator[Problem]:
    """Container runtimes separate mounts by commas and their halves by colons."""
    for mount in config.slurm.container_mounts:
        if ":" not in mount or "," in mount:
            yield Problem(
                "slurm.container_mounts",
                mount,
                "must have the form SOURCE:TARGET without a comma",
                "mount a folder whose name has none",
            )


RULES = (
    _names_are_slurms,
    _time_limit_is_a_duration,
    _time_limit_leaves_time_to_train,
    _fewest_nodes_are_among_the_nodes,
    _container_has_an_image,
    _options_are_options,
    _mounts_are_pairs,
)
