"""``RUN/status.json``: which process trains, and whether it has ended in order."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from moepp_megatron.observe.atomic import write_atomic
from moepp_megatron.observe.metrics import StepMetrics

STATUS_FILE = "status.json"


class RunStatus(BaseModel):
    """What the process that writes a run's records says of itself.

    Attributes:
        state: ``running``, or ``ended`` where training came to its end or stopped on request.
        host: Name of its machine.
        pid: Its process there.
        started: When that process began, seconds since 1970: a pid may be given out again.
        time: When this was written.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    state: Literal["running", "ended"]
    host: str
    pid: int
    started: float
    time: float

    def is_gone(self) -> bool | None:
        """Whether the process exists no longer; None where this machine cannot tell."""
        import psutil

        if self.host != socket.gethostname():
            return None
        try:
            # Process times have a resolution of a hundredth of a second.
            return abs(psutil.Process(self.pid).create_time() - self.started) > 1.0
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return None


def write_status(run_dir: Path, state: Literal["running", "ended"]) -> None:
    """Writes this process's status.

    Raises:
        OSError: The folder cannot be written.
    """
    import psutil

    status = RunStatus(
        state=state,
        host=socket.gethostname(),
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        time=time.time(),
    )
    write_atomic(run_dir / STATUS_FILE, status.model_dump_json().encode() + b"\n")


class StatusSink:
    """Keeps ``RUN/status.json``: ``running`` from here on, ``ended`` once closed.

    A run that fails or is killed closes nothing, and leaves a process that is gone.

    Args:
        run_dir: The run's folder.

    Raises:
        OSError: The folder cannot be written.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        write_status(run_dir, "running")

    def write(self, record: StepMetrics) -> None:
        """A record changes nothing."""

    def go_back(self, step: int) -> None:
        """Going back changes nothing."""

    def close(self) -> None:
        """Says that training has ended in order."""
        write_status(self._run_dir, "ended")


def read_status(run_dir: Path) -> RunStatus | None:
    """The status of a run; None where it has none that can be read."""
    try:
        return RunStatus.model_validate_json((run_dir / STATUS_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
