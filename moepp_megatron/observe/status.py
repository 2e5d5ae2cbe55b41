"""`RUN/status.json`: the processes that train, whether they have ended, how to continue.

Whoever starts a run claims its folder with this file before anything else is written there
(`training.run_folder`). The process that writes the records then adds itself to the launcher that
has claimed the folder.
"""

import os
import shlex
import socket
import time
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from moepp_megatron.config.regular_file import check_regular
from moepp_megatron.file_names import STATUS_FILE
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.runtime.atomic import write_atomic

# The claim of a run's launcher, as JSON, for its ranks.
CLAIM = "MOEPP_CLAIM"
# The command that starts the run again, from whoever has started `moepp train`: a script, or the
# launcher of ranks that decide about the folder themselves.
RESUME_COMMAND = "MOEPP_RESUME_COMMAND"


class _ProcessId(BaseModel):
    """A process; its start time, seconds since 1970, because a pid may be reused."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    pid: int
    started: float

    @classmethod
    def own(cls) -> "_ProcessId":
        """This process."""
        return cls(pid=os.getpid(), started=psutil.Process().create_time())

    def is_gone(self) -> bool | None:
        """True if it has ended on this machine; None if unknown."""
        try:
            process = psutil.Process(self.pid)
            # Process times have a resolution of a hundredth of a second.
            is_other = abs(process.create_time() - self.started) > 1.0
            return is_other or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return None


class RunStatus(BaseModel):
    """The report of a run's processes about themselves.

    Attributes:
        state: `running`, or `ended` where training came to its end or stopped on request.
        started: When that process began, seconds since 1970.
        time: When this was written.
        launcher: The launcher that has claimed the folder and restarts ranks; None for none.
        start: Name of this start of the run for all its ranks; None if ranks need none.
        restarted: Whether that start continues what the same job or launcher has begun.
        job: Number of the Slurm job; None outside of one.
        resume_command: The shell command that continues the run; None if unknown.
        folder: Working directory of that command.
        is_configured: Whether RUN/config.yaml is that of this start, or of the one that it
            continues: until ranks train, it may be an older one.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    state: Literal["running", "ended"]
    host: str
    pid: int
    started: float
    time: float
    launcher: _ProcessId | None = None
    start: str | None = None
    restarted: bool = False
    job: str | None = None
    resume_command: str | None = None
    folder: str | None = None
    is_configured: bool = False

    @classmethod
    def own(
        cls,
        start: str | None = None,
        restarted: bool = False,
        resume_command: str | None = None,
        is_configured: bool = False,
    ) -> "RunStatus":
        """The status of this process, which is about to train or to start ranks."""
        return cls(
            state="running",
            host=socket.gethostname(),
            time=time.time(),
            start=start,
            restarted=restarted,
            job=os.environ.get("SLURM_JOB_ID"),
            resume_command=resume_command,
            folder=os.getcwd(),
            is_configured=is_configured,
            **_ProcessId.own().model_dump(),
        )

    @classmethod
    def of_rank(cls) -> "RunStatus":
        """The status of this process as a training rank; keeps the claim of its launcher."""
        own, claim = cls.own(is_configured=True), cls.inherited()
        if claim is None:
            return own
        known = claim.model_copy(
            update=own.model_dump(include={"pid", "started", "time", "host", "is_configured"})
        )
        if claim.pid == own.pid:
            return known
        launcher = _ProcessId(pid=claim.pid, started=claim.started)
        return known.model_copy(update={"launcher": launcher})

    @classmethod
    def inherited(cls) -> "RunStatus | None":
        """The status with which this rank's launcher, or this process, has claimed the folder."""
        try:
            return cls.model_validate_json(os.environ.get(CLAIM, ""))
        except ValidationError:
            return None

    @classmethod
    def read(cls, run_dir: Path) -> "RunStatus | None":
        """The status of a run; None where it has none that can be read."""
        try:
            check_regular(run_dir / STATUS_FILE)
            return cls.model_validate_json((run_dir / STATUS_FILE).read_bytes())
        except (OSError, ValidationError):
            return None

    def write(self, run_dir: Path) -> None:
        """Replace the run's status; raise OSError if the folder cannot be written."""
        write_atomic(run_dir / STATUS_FILE, self.model_dump_json().encode() + b"\n")

    def resume_command_here(self) -> str | None:
        """`resume_command` for a shell in this process's folder."""
        if self.resume_command is None or self.folder is None or self.folder == os.getcwd():
            return self.resume_command
        # One that changes folder itself does so from anywhere.
        if self.resume_command.startswith("cd "):
            return self.resume_command
        return f"cd {shlex.quote(self.folder)} && {self.resume_command}"

    def is_gone(self) -> bool | None:
        """True if none of its processes is left; None if this machine cannot know."""
        if self.host != socket.gethostname():
            return None
        answers = [_ProcessId(pid=self.pid, started=self.started).is_gone()]
        if self.launcher is not None:
            answers.append(self.launcher.is_gone())
        if False in answers:
            return False
        return None if None in answers else True


class StatusSink:
    """Keeps `RUN/status.json`: `running` from here on, `ended` once closed.

    It is written again where it was removed, so that no other run takes the folder for free. A run
    that fails or is killed does not close it, and leaves the id of a process that is gone. Raises
    OSError if the folder cannot be written.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        RunStatus.of_rank().write(run_dir)

    def write(self, record: StepMetrics) -> None:
        """Write the status if it is gone; a record does not change it."""
        if not (self._run_dir / STATUS_FILE).exists():
            RunStatus.of_rank().write(self._run_dir)

    def go_back(self, step: int) -> None:
        """Do nothing: a rollback does not change the status."""

    def close(self) -> None:
        """Record that training has ended in order."""
        RunStatus.of_rank().model_copy(update={"state": "ended"}).write(self._run_dir)
