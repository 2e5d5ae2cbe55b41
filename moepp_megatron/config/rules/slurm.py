"""Rules of the section `slurm`."""

from __future__ import annotations

import re

from moepp_megatron.config.rows import Rule, each, entries, refuse, values
from moepp_megatron.config.schema import Config

# What Slurm's names and lists of names consist of, and how it writes durations.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:&|()\[\]*%+-]*")
_TIME = re.compile(r"(\d+-\d{1,2}(:\d{2}){0,2})|(\d+(:\d{2}){0,2})")


def _seconds(time: str) -> int:
    """A duration in one of Slurm's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _limit(config: Config) -> int:
    """The time limit in seconds; 0 for none, as Slurm takes it, and for what is no duration."""
    time = config.slurm.time
    return _seconds(time) if time is not None and _TIME.fullmatch(time) else 0


RULES: tuple[Rule, ...] = (
    each(
        values("slurm.partition slurm.account slurm.qos slurm.constraint slurm.exclude"),
        lambda value: value is not None and not _NAME.fullmatch(value),
        "must hold only letters, digits and _.,:&|()[]*%+-",
        "use a name that this cluster has, or null",
    ),
    each(
        values("slurm.time"),
        lambda time: time is not None and not _TIME.fullmatch(time),
        "must be minutes, hours:minutes:seconds or days-hours:minutes:seconds",
        'write for example "4:00:00" or "2-00:00:00"',
    ),
    # A job is not asked to stop as soon as it starts.
    refuse(
        "slurm.signal_before_s",
        lambda c: 0 < _limit(c) <= c.slurm.signal_before_s,
        lambda c: f"must be below slurm.time ({c.slurm.time}, {_limit(c)} s)",
        "lower it, or raise the time limit",
    ),
    refuse(
        "slurm.min_nodes",
        lambda c: (c.slurm.min_nodes or 0) > c.slurm.nodes,
        "must be at most slurm.nodes ({slurm.nodes})",
        "use {slurm.nodes} or less, or null",
    ),
    refuse(
        "slurm.container_image",
        lambda c: c.slurm.container != "none" and c.slurm.container_image is None,
        "must name an image for slurm.container ({slurm.container})",
        "name one, or use slurm.container none",
    ),
    refuse(
        "slurm.container_image",
        lambda c: c.slurm.container == "none" and c.slurm.container_image is not None,
        "must come with slurm.container pyxis or apptainer",
        "set slurm.container, or leave the image out",
    ),
    each(
        entries("slurm.options"),
        lambda option: not option.startswith("--") or not option.isprintable(),
        "must be a long option of sbatch on one line",
        "write it as --name=value",
    ),
    # Container runtimes separate mounts by commas and their halves by colons.
    each(
        entries("slurm.container_mounts"),
        lambda mount: ":" not in mount or "," in mount,
        "must have the form SOURCE:TARGET without a comma",
        "mount a folder whose name has none",
    ),
)
