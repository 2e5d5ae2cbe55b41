"""Moving a run out of the way of a new one in the same folder; nothing is deleted."""

import itertools
import os
import shutil
import time
from pathlib import Path

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.config.load import config_layers
from moepp_megatron.config.sections import used
from moepp_megatron.file_names import CONFIG_FILE, LATEST_FILE, OWNER_FILE, STATUS_FILE, is_of_run
from moepp_megatron.runtime.object_store import ObjectPath
from moepp_megatron.training.checkpoint.files import PREFIX
from moepp_megatron.training.checkpoint.find import checkpoints_of, list_checkpoints
from moepp_megatron.training.run_folder.ownership import (
    OwnerMark,
    is_inside,
    is_same,
)


def move_aside(config: Config, checkpoints: Path, config_file: Path | None = None) -> list[str]:
    """Move the files of a run to a new folder next to its own, named by date and time.

    Files that no run writes and folders with other runs are left, as is Slurm's output, which the
    new run may be writing, and `config_file` with its bases; of config.yaml, a record of the run
    too, a copy is moved. Checkpoints outside of the run's folder get a neighbour of their own, so
    that nothing is copied.

    Returns:
        One line per moved folder: from where to where.

    Raises:
        ConfigError: `checkpoint.load` or the teacher is something that would be moved.
        OSError: The folder's parent cannot be written.
    """
    folder = Path(config.run.dir)
    if isinstance(checkpoints, ObjectPath) and list_checkpoints(checkpoints):
        raise ConfigError(
            f"checkpoint.dir ({checkpoints}) must hold no checkpoints for --overwrite, since "
            "nothing can be moved in object storage; choose another checkpoint.dir, or delete them"
        )
    ours = configuration_files(config_file)
    named = (checkpoints, *(value for _, value in used(config, "output")))
    written = {os.path.realpath(path) for path in named if not isinstance(path, ObjectPath | None)}
    moved = [
        path
        for path in sorted(folder.iterdir())
        if (is_of_run(path.name) or os.path.realpath(path) in written)
        and not _holds_runs(path, folder)
    ]
    # Before a link to it is moved.
    mark = OwnerMark(folder, checkpoints)
    old = _left_checkpoints(checkpoints, folder, moved)
    _refuse_moved_start(config, [*moved, *old])
    lines, place = [], None
    if old:
        place = _move(old, old[0].parent)
        lines.append(f"moved the checkpoints of before to {place}")
    if moved:
        keeps_config = os.path.realpath(folder / CONFIG_FILE) in ours
        if keeps_config:
            moved.remove(folder / CONFIG_FILE)
        target = _move(moved, folder)
        if keeps_config:
            shutil.copy2(folder / CONFIG_FILE, target / CONFIG_FILE)
        lines.append(f"moved the run of before to {target}")
        mark.carry(place, target)
    return lines


def configuration_files(config_file: Path | None) -> set[str]:
    """The configuration's file and its bases, which each rank reads; links are resolved."""
    # Not of a pipe, which can be read once.
    if config_file is None or not config_file.is_file():
        return set()
    return {os.path.realpath(path) for path, _ in config_layers(config_file)}


def _left_checkpoints(checkpoints: Path, folder: Path, moved: list[Path]) -> list[Path]:
    """The run's checkpoints that are in none of what is moved from its folder."""
    real, home = Path(os.path.realpath(checkpoints)), Path(os.path.realpath(folder))
    if isinstance(checkpoints, ObjectPath) or not real.is_dir():
        return []
    gone = {home / path.name for path in moved}
    return [
        path
        for path in sorted(real.iterdir())
        if (path.name == LATEST_FILE or path.name.lstrip(".").startswith(PREFIX))
        and gone.isdisjoint((path, *path.parents))
    ]


def _holds_runs(path: Path, run: Path) -> bool:
    """True if a folder of the run's has other runs, or checkpoints of some."""
    if any(path.rglob(STATUS_FILE)):
        return True
    owners = {OwnerMark.named(mark.parent) for mark in path.rglob(OWNER_FILE)}
    return not all(is_same(owner, run) for owner in owners if owner)


def _refuse_moved_start(config: Config, moved: list[Path]) -> None:
    load = ("checkpoint.load", config.checkpoint.load)
    for setting, name in (load, *used(config, "checkpoint")):
        if name is None or name == "auto":
            continue
        candidates = checkpoints_of(name, Path(os.path.abspath(config.run.dir)))
        if any(is_inside(path, each) for path in candidates for each in moved):
            raise ConfigError(
                f"{setting} ({name}) must not be in the run that --overwrite moves aside; choose "
                "another run.dir"
            )


def _move(paths: list[Path], folder: Path) -> Path:
    """Move to a new neighbour of `folder`."""
    folder = folder.absolute()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        suffix = stamp if number == 1 else f"{stamp}-{number}"
        target = folder.with_name(f"{folder.name}.{suffix}")
        try:
            target.mkdir()
            break
        except FileExistsError:
            continue
    for path in paths:
        os.rename(path, target / path.name)
    return target
