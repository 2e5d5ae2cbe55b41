"""The batch script of a run on a Slurm cluster.

Values of a configuration reach two languages: bash, quoted by `shlex.quote`, and the `#SBATCH`
lines that sbatch reads by rules of its own. The template quotes whatever it prints, so that a value
with unexpected characters is still a single value.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from moepp_megatron.config import Config, ConfigError, check_world_size
from moepp_megatron.config.errors import show

REPOSITORY = Path(__file__).resolve().parents[2]
_TEMPLATE = "job.sbatch.j2"
_PREFLIGHT_TIMEOUT = "10m"


@dataclass(frozen=True)
class SlurmJob:
    """The job that a batch script runs.

    Attributes:
        config: The run's configuration, overrides applied.
        config_file, overrides: Its file, and the overrides for the command line of `moepp train`.
        directory: Folder in which the job runs; relative paths of the configuration start here.
    """

    config: Config
    config_file: Path
    overrides: Sequence[str]
    directory: Path

    @property
    def ranks_per_node(self) -> int:
        """Ranks per node: one per GPU."""
        return self.config.slurm.gpus_per_node or self.config.slurm.cpu_ranks_per_node

    @property
    def output_folder(self) -> Path:
        """The folder for the job's output by Slurm."""
        return self.directory / self.config.run.dir / "slurm"

    def resume_command(self) -> str:
        """The command that submits the job again from any folder."""
        words = ["moepp", "slurm", str(self.config_file.absolute()), *self.overrides]
        words += ["--nodes", str(self.config.slurm.nodes), "--submit"]
        return f"cd {shlex.quote(str(self.directory))} && {shlex.join(words)}"

    def node_counts(self) -> list[int]:
        """Numbers of nodes that the job may run on, fewest first.

        ConfigError if the layout fits neither `slurm.nodes` nor, if set, `slurm.min_nodes`.
        """
        slurm = self.config.slurm
        fewest = slurm.min_nodes or slurm.nodes
        counts = []
        for count in range(fewest, slurm.nodes + 1):
            try:
                check_world_size(self.config, count * self.ranks_per_node)
            except ConfigError as error:
                if count in (fewest, slurm.nodes):
                    where = f"{count} nodes * {self.ranks_per_node} ranks"
                    raise ConfigError(f"{error} (slurm: {where})") from None
            else:
                counts.append(count)
        return counts

    def script(self) -> str:
        """The batch script; ConfigError if layout and nodes, or a value and bash, do not fit."""
        if not (REPOSITORY / "slurm" / "common.sh").is_file():
            raise ConfigError(
                f"the installation ({REPOSITORY}) must be a clone of the repository with its "
                "folder slurm; install with: pip install -e 'CLONE[all]'"
            )
        slurm = self.config.slurm
        # -P: nothing is imported from the folder that the job runs in.
        command = [sys.executable, "-P", "-m", "moepp_megatron.cli.main"]
        if slurm.container != "none":
            # This Python is outside; the image brings its own.
            command = ["moepp"]
        return (
            _environment()
            .get_template(_TEMPLATE)
            .render(
                options=self._options(),
                root=str(REPOSITORY),
                resume_command=self.resume_command(),
                command=command,
                ranks_per_node=self.ranks_per_node,
                max_restarts=slurm.max_restarts,
                restart_timeout=slurm.restart_timeout_s,
                max_requeues=slurm.max_requeues,
                requeue_on_failure=int(slurm.requeue_on_failure),
                signal_before=slurm.signal_before_s,
                preflight=self._preflight(command),
                container=slurm.container,
                container_image=slurm.container_image or "",
                container_mounts=slurm.container_mounts,
                arguments=[str(self.config_file.absolute()), *self.overrides],
            )
        )

    def submit(self) -> str:
        """Hand the script to sbatch and return what it prints.

        ConfigError if there is no sbatch, or it refuses; no folder is made then.
        """
        output = self.output_folder
        made = [folder for folder in (output, *output.parents) if not folder.exists()]
        output.mkdir(parents=True, exist_ok=True)
        try:
            return self._submitted()
        except ConfigError:
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()
            raise

    def _submitted(self) -> str:
        try:
            done = subprocess.run(
                ["sbatch"],
                input=self.script(),
                capture_output=True,
                text=True,
                encoding="utf-8",
                # A path may hold bytes that are no text.
                errors="surrogateescape",
                cwd=self.directory,
            )
        except FileNotFoundError:
            raise ConfigError(
                "--submit must find sbatch on the PATH; run it on a login node, or leave --submit "
                "out and copy the script there"
            ) from None
        if done.returncode != 0:
            raise ConfigError(f"sbatch refused the job: {' '.join(done.stderr.split())}")
        return done.stdout.strip()

    def _preflight(self, command: list[str]) -> list[str]:
        slurm = self.config.slurm
        if not slurm.preflight:
            return []
        # A hung file system would hold doctor up; a node that does not answer is sick too.
        limit = ["timeout", _PREFLIGHT_TIMEOUT]
        return slurm.preflight_command or [*limit, *command, "doctor", "--preflight"]

    def _options(self) -> list[_Option]:
        slurm, shared = self.config.slurm, "slurm.exclusive false"
        output = f"{_no_pattern('run.dir', str(self.output_folder))}/%j.out"
        # The value, True for a flag and None for what is left out; and what to use instead.
        own: dict[str, tuple[str | int | None, str]] = {
            "job-name": (self.config.run.name, "run.name"),
            "chdir": (str(self.directory), "the folder that you start moepp slurm in"),
            "output": (output, "run.dir"),
            # A requeued job continues in the same file.
            "open-mode": ("append", "what is set"),
            "nodes": (_node_option(self.node_counts()), "slurm.nodes"),
            # One launcher a node, which starts the ranks.
            "ntasks-per-node": (1, "slurm.gpus_per_node or slurm.cpu_ranks_per_node"),
            "gpus-per-node": (slurm.gpus_per_node or None, "slurm.gpus_per_node"),
            # Only to the batch script: it passes the request on.
            "signal": (f"B:USR1@{slurm.signal_before_s}", "slurm.signal_before_s"),
            "array": (None, "a job for each run"),
            "requeue": (True, "slurm.max_requeues"),
            "no-requeue": (None, "slurm.max_requeues 0"),
        }
        if slurm.exclusive:
            # All memory of the node comes with it.
            own |= {"exclusive": (True, shared), "mem": (0, shared)}
        for name in ("time", "partition", "account", "qos", "constraint", "exclude"):
            own[name] = (getattr(slurm, name), f"slurm.{name}")
        for option in slurm.options:
            # sbatch takes the beginning of a name for it.
            start = option.partition("=")[0].removeprefix("--")
            if instead := [use for name, (_, use) in own.items() if name.startswith(start)]:
                raise ConfigError(
                    f"slurm.options ({show(option)}) must not be an option that moepp slurm sets "
                    f"itself; use {instead[0]}"
                )
        given = {name: value for name, (value, _) in own.items() if value is not None}
        flags = [f"--{name}" for name, value in given.items() if value is True]
        valued = [f"--{name}={value}" for name, value in given.items() if value is not True]
        return [_Option(text) for text in [*valued, *flags, *slurm.options]]


class _Option(str):
    """An option of sbatch, for a `#SBATCH` line."""


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        # Not for pages: `finalize` quotes what is printed.
        autoescape=False,
        finalize=_quoted,
    )


def _quoted(value: Any) -> str:
    """A value in the form that the script needs."""
    if isinstance(value, _Option):
        return _sbatch_word(value)
    if isinstance(value, str):
        if "\0" in value:
            raise ConfigError(f"a value ({show(value)}) must not hold a zero byte; remove it")
        return shlex.quote(value)
    assert type(value) is int, f"{value!r} has no form in a script"
    return str(value)


def _sbatch_word(option: str) -> str:
    """One word of a `#SBATCH` line, by the rules of sbatch's own parser (src/sbatch/opt.c)."""
    # It knows double quotes and backslashes, but no escape for the end of a line.
    name, equals, value = option.partition("=")
    if not option.isprintable():
        raise ConfigError(
            f"{name} ({show(value)}) must be printable text on one line; rename what it comes from "
            "(run.name, run.dir, the folder you are in)"
        )
    if not equals:
        return option
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}="{escaped}"'


def _no_pattern(name: str, path: str) -> str:
    """A path for --output, in which % starts a pattern and a backslash switches patterns off."""
    if "\\" in path:
        raise ConfigError(
            f"{name} ({show(path)}) must not hold a backslash, with which Slurm would ignore the "
            "job's number in the name of the output; rename the folder"
        )
    return path.replace("%", "%%")


def _node_option(counts: list[int]) -> str:
    if counts[-1] - counts[0] + 1 == len(counts):
        return str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
    return ",".join(map(str, counts))
