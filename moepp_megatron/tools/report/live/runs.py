"""Watches all runs in folders, including those that come later."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from moepp_megatron.file_names import RUN_FILES
from moepp_megatron.tools.report.live.run import LiveRun, check_folder
from moepp_megatron.tools.report.run_data import ReportError, name_below, runs_inside


class LiveRuns:
    """The runs of some folders; `look` updates them.

    A folder is a run's, or holds folders of runs directly: then each of them counts, also one that
    comes later.

    Raises:
        ReportError: If a path is not a folder, or has nothing to do with a run.
    """

    def __init__(self, folders: Sequence[Path], clock: Callable[[], float] = time.time) -> None:
        self._folders = list(dict.fromkeys(Path(os.path.abspath(folder)) for folder in folders))
        for folder in folders:
            if _runs_in(folder) == [folder]:
                check_folder(folder)
        self._base = Path(os.path.commonpath(self._folders))
        self._clock = clock
        self._runs: dict[Path, LiveRun] = {}

    @property
    def has_one_run(self) -> bool:
        """True if there is one folder, and it is a run's or empty."""
        return len(self._folders) == 1 and _runs_in(self._folders[0]) == self._folders

    def look(self) -> dict[str, LiveRun]:
        """Read new records; a run that cannot be read stays as it was.

        Returns:
            Every run by its name: the path below the folder that all have in common. It depends on
            the folders that were given, not on which runs there are.
        """
        known, self._runs = self._runs, {}
        for folder in itertools.chain.from_iterable(map(_runs_in, self._folders)):
            # Gone, or a file that is being replaced.
            with contextlib.suppress(ReportError):
                self._runs[folder] = known.get(folder) or LiveRun(folder, self._clock)
                self._runs[folder].poll()
        return {name_below(self._base, folder): run for folder, run in self._runs.items()}


def _runs_in(folder: Path) -> list[Path]:
    """The folders of runs in a folder; the folder itself if it is a run's, or holds none."""
    if any((folder / name).exists() for name in RUN_FILES):
        return [folder]
    return runs_inside(folder) or [folder]
