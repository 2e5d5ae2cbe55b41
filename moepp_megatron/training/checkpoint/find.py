"""Find the checkpoint that a name means, or the newest valid one. Imports no torch."""

import functools
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Concatenate

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.config.paths import looked_at
from moepp_megatron.config.yaml_file import read_mapping
from moepp_megatron.file_names import (
    CONFIG_FILE,
    FORMAT_FILE,
    LATEST_FILE,
    MANIFEST_FILE,
    MODEL_CONFIG_FILE,
    TOKENIZER_FILE,
)
from moepp_megatron.runtime.object_store import place
from moepp_megatron.runtime.rank import RankEnvironment
from moepp_megatron.training.checkpoint.compatible import check_compatible
from moepp_megatron.training.checkpoint.files import (
    PREFIX,
    NewerFormatError,
    SavedRecord,
    checkpoint_step,
    damage,
    plain_damage,
)

logger = logging.getLogger(__name__)


class NoStartError(ConfigError):
    """A run cannot start from its checkpoints or in its folder. All ranks that run raise it."""


_NAME = re.compile(rf"{PREFIX}\d+")
# How often the newest is looked for while a run removes it.
_TRIES = 3
# How far clocks of two machines that are set may differ.
_CLOCKS_DIFFER_S = 60.0


def find_checkpoint(
    name: str | Path, run: Path | None = None, reason_against: Callable[[Path], str | None] = damage
) -> Path:
    """Return the checkpoint that `name` means; ConfigError if there is none, or a newer format.

    A checkpoint folder is itself. A run (its name, its folder, or the folder of its checkpoints)
    means its newest valid checkpoint. `name` may also be a run in the parent folder of `run`.
    """
    path = place(name)
    if _is_checkpoint(path):
        _refuse_newer(path)
        return path
    for folder in _checkpoint_folders(name, run):
        for _ in range(_TRIES):
            found = list_checkpoints(folder)
            newest, skipped = first_valid(found, reason_against)
            # A run that is training may have replaced them by newer ones in the meantime.
            if newest is not None or all(each.is_dir() for each in found):
                break
        warn_skipped(skipped)
        if newest is not None:
            return newest
    remedy = "train with checkpoint.save_interval > 0 or name another folder"
    if (path / MODEL_CONFIG_FILE).is_file():
        remedy = (
            "this is a folder of Hugging Face: convert a MoE++ model with moepp convert "
            "hf-to-mcore, any other with moepp convert upcycle"
        )
    raise ConfigError(
        f"checkpoint ({path}) must be a checkpoint folder or a run that has a valid one"
        f"{looked_at(path)}; {remedy}"
    )


def newest_again[**P, T](
    act: Callable[Concatenate[Path, P], T],
) -> Callable[Concatenate[str | Path, P], T]:
    """Retry `act` with the newest checkpoint if its run deletes the one in use.

    The result takes what `find_checkpoint` takes. It does not retry among ranks, of which others
    would continue with the checkpoint that is gone.
    """

    @functools.wraps(act)
    def wrapped(name: str | Path, *args: P.args, **kwargs: P.kwargs) -> T:
        for _ in range(_TRIES - 1):
            folder = find_checkpoint(name)
            try:
                return act(folder, *args, **kwargs)
            except Exception:
                if folder.is_dir() or folder == place(name) or RankEnvironment.read().is_launched:
                    raise
                logger.warning("%s was removed by its run; the newest is taken again", folder)
        return act(find_checkpoint(name), *args, **kwargs)

    return wrapped


def checkpoints_of(name: str, run: Path) -> list[Path]:
    """The checkpoints that `name` may mean, newest first; see `find_checkpoint`."""
    path = place(name)
    if _is_checkpoint(path):
        return [path]
    folders = _checkpoint_folders(name, run)
    return [checkpoint for each in folders for checkpoint in list_checkpoints(each)]


def chosen_start(
    config: Config,
    folder: Path,
    first: Callable[[list[Path]], tuple[Path | None, list[str]]],
) -> Path | None:
    """The checkpoint that `checkpoint.load` means, among those that it may mean, newest first.

    `first` picks the first valid one, as `first_valid`. `auto` means those in `folder`, the run's
    own, and starts from scratch (None) where there are none. NoStartError if nothing can be read.
    """
    name = config.checkpoint.load
    if name is None:
        return None
    run = Path(os.path.abspath(config.run.dir))
    found = list_checkpoints(folder) if name == "auto" else checkpoints_of(name, run)
    start, skipped = first(found)
    if start is not None:
        return start
    if name != "auto":
        why = f" ({'; '.join(skipped)})" if skipped else ""
        raise NoStartError(
            f"checkpoint.load ({name}) must be a checkpoint folder or a run that has a valid one"
            f"{why}{looked_at(place(name))}; name another one, auto, or null"
        )
    if skipped:
        raise NoStartError(
            f"checkpoint.load (auto) must find a valid checkpoint of this run, and none of "
            f"{len(skipped)} is: {'; '.join(skipped)}; restore one of them, or move them away to "
            "start from scratch"
        )
    return None


def check_start(config: Config, folder: Path) -> None:
    """Refuse (ConfigError), before any rank starts, a `checkpoint.load` that does not fit.

    There is none of that name, all are damaged, one has a newer format, or its model has other
    shapes or other tokens. Hashes no tensors.
    """
    start = chosen_start(config, folder, lambda found: first_valid(found, plain_damage))
    if start is not None:
        # Later, since it imports numpy.
        from moepp_megatron.data.prepared_data import check_model_tokenizer

        check_compatible(start, config)
        check_model_tokenizer(config, start / TOKENIZER_FILE)


def _checkpoint_folders(name: str | Path, sibling: Path | None) -> list[Path]:
    """The folders of checkpoints that a run called `name` may have, likeliest first."""
    path = place(name)
    runs = [path]
    if sibling is not None and not path.is_absolute():
        runs.append(sibling.parent / path)
    folders = []
    for run in runs:
        folders += [run, run / "checkpoints"]
        configured = _configured_folder(run)
        if configured is not None:
            folders.append(configured)
    return [folder for folder in folders if folder.is_dir()]


def list_checkpoints(folder: Path) -> list[Path]:
    """Return checkpoint folders, complete or not, the one written last first.

    A run that went back to step 50 and saved step 60 has step 60 as its newest, though the earlier
    step 100 is still there. Where a date is missing or ahead of the clock, steps decide, and those
    past the one that the file `latest` names, which are undone, come last.
    """
    dates = checkpoint_dates(folder)
    now = time.time() + _CLOCKS_DIFFER_S
    if all(0.0 <= date <= now for date in dates.values()):
        return sorted(dates, key=lambda path: (dates[path], checkpoint_step(path)), reverse=True)
    try:
        latest = folder / (folder / LATEST_FILE).read_bytes().decode("ascii").strip()
    except (OSError, ValueError):
        latest = folder
    end = checkpoint_step(latest) if latest in dates else math.inf
    steps = {path: checkpoint_step(path) for path in dates}
    return sorted(dates, key=lambda path: (steps[path] <= end, steps[path]), reverse=True)


def checkpoint_dates(folder: Path) -> dict[Path, float]:
    """Return when each checkpoint in `folder` was saved, in seconds since 1970."""
    try:
        return {path: _date(path) for path in folder.iterdir() if _NAME.fullmatch(path.name)}
    except OSError:
        return {}


def first_valid(
    checkpoints: Iterable[Path], reason_against: Callable[[Path], str | None]
) -> tuple[Path | None, list[str]]:
    """Return the first valid one and a line for each before; NewerFormatError if any is newer."""
    # A checkpoint of a newer format is not damaged, and may be the newest.
    checkpoints = list(checkpoints)
    skipped: list[str] = []
    for checkpoint in checkpoints:
        _refuse_newer(checkpoint)
    for checkpoint in checkpoints:
        reason = reason_against(checkpoint)
        if reason is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint}: {reason}")
    return None, skipped


def warn_skipped(skipped: Iterable[str]) -> None:
    """Say which checkpoints were not taken, and why."""
    for line in skipped:
        logger.warning("skipping checkpoint %s", line)


def _refuse_newer(checkpoint: Path) -> None:
    try:
        SavedRecord.read(checkpoint)
    except NewerFormatError:
        raise
    except ValueError:
        # Damaged, which others say.
        return


def _configured_folder(run: Path) -> Path | None:
    """`checkpoint.dir` of a run, which need not be inside the run."""
    try:
        folder = read_mapping(run / CONFIG_FILE)["checkpoint"]["dir"]
    except (ConfigError, KeyError, TypeError):
        return None
    return place(folder) if isinstance(folder, str) else None


def _date(checkpoint: Path) -> float:
    try:
        record = SavedRecord.read(checkpoint)
    except ValueError:
        record = None
    if record is not None:
        return record.saved_at
    try:
        return checkpoint.stat().st_mtime
    except OSError:
        return 0.0


def _is_checkpoint(path: Path) -> bool:
    """True if `path` has all files of a checkpoint; `damage` checks their contents."""
    return all((path / name).is_file() for name in (FORMAT_FILE, CONFIG_FILE, MANIFEST_FILE))
