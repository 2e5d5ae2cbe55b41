"""A whole run: what `moepp train` does, for the command line and for Python."""

import contextlib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moepp_megatron.config import Config, ConfigError, UnfitError
from moepp_megatron.config.exit_codes import STOPPED
from moepp_megatron.file_names import METRICS_FILE
from moepp_megatron.observe.status import RESUME_COMMAND, RunStatus
from moepp_megatron.runtime.launch import LaunchOptions
from moepp_megatron.runtime.terminal import lasting_output
from moepp_megatron.training.checkpoint.files import checkpoint_step, package_versions
from moepp_megatron.training.checkpoint.find import NoStartError, list_checkpoints
from moepp_megatron.training.run_folder import RunFolder, Start, checkpoint_folder
from moepp_megatron.training.train_request import Say, TrainRequest

if TYPE_CHECKING:
    from torch.distributed import Store

    from moepp_megatron.observe.metrics import StepMetrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Result of a run in `folder`.

    Attributes:
        step: Steps that the run has taken, those before this start included.
        metrics: Metrics of the last logged step; None where this process, being a rank, had nothing
            left to do.
        stopped: The run was asked to stop, or paused by itself; it has saved, and `resume`
            continues it.
        pause_reason: Why it has paused by itself; None if it has not, or where other processes have
            trained.
        failure: What of the run's end is on no disk, in one line; None if all of it is.
    """

    folder: Path
    step: int = 0
    metrics: "StepMetrics | None" = None
    stopped: bool = False
    failure: str | None = None
    pause_reason: str | None = None


class RanksFailedError(RuntimeError):
    """Ranks that were started here have ended with `status`, and have said why."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the ranks have ended with exit status {status}; they say why above")
        self.status = status


def train(
    config: Config | str | Path,
    *overrides: str,
    resume: bool = False,
    overwrite: bool = False,
    nproc: int = 1,
    callbacks: Sequence[object] = (),
) -> TrainResult:
    """Train the model that a configuration describes, as `moepp train` does but for the report.

    Alone it trains in this process. In a script that torchrun or srun has started, every rank calls
    it, and each gets the result. Like the command it listens to Ctrl-C and other signals
    (`STOP_SIGNALS`), so the main thread must call. Ranks that `nproc` starts write the report too.

    Args:
        config: A configuration, or its YAML file.
        overrides: Settings `section.key=value` over it, the value as YAML.
        resume: Go on from the newest checkpoint of the run in `run.dir`.
        overwrite: Move the run in `run.dir` aside and start from scratch.
        nproc: Ranks to start on this machine, in processes of their own.
        callbacks: Get the run's events, before those of `run.callbacks`. They cannot be passed to
            processes that `nproc` starts.

    Returns:
        The run's progress; losses in nats per token, times in seconds (`StepMetrics`).

    Raises:
        ConfigError: A ValueError; the configuration, the data or the run's folder do not allow it.
        UnfitError: A RuntimeError; this machine cannot do it.
        RanksFailedError: Ranks that were started have failed.
        OSError: The run's last state could not be written.
    """
    with lasting_output():
        options = LaunchOptions(nproc, stoppable=True)
        start = Start(resume=resume, overwrite=overwrite)
        given = config if isinstance(config, Config) else Path(config)
        request = TrainRequest.read(given, overrides, options, start, logger.warning).admitted(
            logger.warning
        )
        if callbacks and request.starts_ranks:
            raise ConfigError(
                f"nproc ({nproc}) must be 1 with callbacks, which are objects of this process; "
                "start the script with torchrun, or name installed ones in run.callbacks"
            )
        try:
            result = run(request, print, callbacks)
        except RanksFailedError as error:
            for refusal in (ConfigError, UnfitError):
                if error.status == refusal.exit_code:
                    raise refusal(str(error)) from None
            raise
    if result.failure is not None:
        raise OSError(result.failure)
    return _as_written(result, request.config) if request.starts_ranks else result


def run(request: TrainRequest, say: Say, callbacks: Sequence[object] = ()) -> TrainResult:
    """Train as an admitted request says: be one rank, or start this machine's ranks.

    `say` is called with messages before the first step, on rank 0; `callbacks` as for `train`. The
    result of ranks that were started is only what their exit status means. ConfigError if the run
    may not start in its folder, or has nothing to start from (`NoStartError`, on all ranks alike);
    RanksFailedError if ranks that were started have failed.
    """
    with _entering(request, say):
        return _start_ranks(request) if request.starts_ranks else _run_rank(request, say, callbacks)


def _entering(request: TrainRequest, say: Say) -> AbstractContextManager[None]:
    """Claim the run's folder in the block, or check it if another process claims it."""
    if RunStatus.inherited() is not None:
        return contextlib.nullcontext()
    folder = RunFolder(request.config)
    if request.leads:
        return folder.claim(request.start, say)
    folder.check_without_claim(request.start)
    return contextlib.nullcontext()


def _start_ranks(request: TrainRequest) -> TrainResult:
    """Start this machine's ranks, which decide where this machine is not known as the first."""
    from moepp_megatron.runtime.launch import run_ranks

    start = request.start
    flags = ["--resume"] if start.resume else []
    if not request.leads:
        flags += ["--overwrite"] if start.overwrite else []
        os.environ[RESUME_COMMAND] = start.resume_command or ""
    arguments = ["train", *flags, "--", *request.words]
    options = replace(request.options, alike=_must_be_alike(request.config))
    with request.handing_over():
        status = run_ranks(options, "moepp_megatron.cli.main", arguments)
    if status not in (0, STOPPED):
        raise RanksFailedError(status)
    return TrainResult(Path(request.config.run.dir), stopped=status == STOPPED)


def _run_rank(request: TrainRequest, say: Say, callbacks: Sequence[object]) -> TrainResult:
    """Train as one rank of the run."""
    from moepp_megatron.runtime.optional import quiet

    quiet()
    from moepp_megatron.runtime import distributed
    from moepp_megatron.runtime.stop_signals import die_with_parent
    from moepp_megatron.training.resilience.hang_report import enable_flight_recorder

    config, rank = request.config, request.rank
    folder = Path(config.run.dir)
    if rank.is_launched:
        die_with_parent(os.getppid())
    if config.resilience.hang_timeout_s > 0:
        enable_flight_recorder(folder / "hangs")
    alike = {"--resume": str(request.start.resume), **_must_be_alike(config)}
    check = functools.partial(_refuse_unlike, alike=alike)
    with distributed.initialized(rank, distributed.collective_timeout(config), check) as device:
        if config.run.numa_binding:
            distributed.bind_to_gpu(device)
        # Now, when the device is known: megatron-core compiles some functions on its import, but
        # not on a CPU.
        from moepp_megatron.training.trainer import Trainer

        if rank.world_size > rank.local_world_size:
            RunFolder(config).refuse_unshared(looks=rank.local_rank == 0)
        distributed.build_groups(config, request.layout)
        if rank.rank == 0:
            from moepp_megatron.runtime.backends import package_lines

            for line in package_lines(config):
                say(line)
        trainer = Trainer(config, request.layout, callbacks, request.loads)
        if rank.rank == 0:
            for line in trainer.start_lines:
                say(line)
        record = trainer.run()
    return TrainResult(
        folder,
        trainer.progress.step,
        record,
        trainer.stopped,
        trainer.failure,
        trainer.pause_reason,
    )


def _as_written(result: TrainResult, config: Config) -> TrainResult:
    """The result of ranks in other processes, from what they have written."""
    from moepp_megatron.observe.metrics import MetricsError, read_metrics

    newest = [checkpoint_step(path) for path in list_checkpoints(checkpoint_folder(config))[:1]]
    try:
        last = read_metrics(result.folder / METRICS_FILE)[-1]
    except MetricsError:
        # Stopped before the first step, or a full disk has cost the run its records.
        return replace(result, step=max(newest, default=0))
    return replace(result, step=max([*newest, last.step]), metrics=last)


def _must_be_alike(config: Config) -> dict[str, str]:
    """Versions and settings by name, long values shortened to their beginning and a digest."""
    alike = package_versions()
    for section, keys in config.model_dump(mode="json").items():
        for key, value in keys.items():
            text = json.dumps(value)
            # An environment variable holds all of them, and 128 KiB at most.
            is_long, digest = len(text) > 200, hashlib.sha256(text.encode()).hexdigest()
            alike[f"{section}.{key}"] = f"{text[:60]}... ({digest[:8]})" if is_long else text
    # Python and local disks may differ.
    for name in ("python", "checkpoint.staging"):
        del alike[name]
    return alike


def _refuse_unlike(store: "Store", rank: int, world_size: int, alike: Mapping[str, str]) -> None:
    """Raise NoStartError on all ranks if settings differ; all must call, and meet in `store`."""
    # Else ranks would train with each their own, or wait for each other in collectives.
    if rank == 0:
        store.set("settings", json.dumps(alike))
    first = json.loads(store.get("settings"))
    differing = [name for name in {**first, **alike} if first.get(name) != alike.get(name)]
    others = f" ({len(differing) - 1} other settings differ too)" if len(differing) > 1 else ""
    said = [
        f"{name} ({first.get(name)} on rank 0) must be the same on all ranks, and is "
        f"{alike.get(name)} on rank {rank}{others}; start all with the same options, settings and "
        "packages"
        for name in differing[:1]
    ]
    store.set(f"said {rank}", "".join(said))
    if rank == 0:
        of_ranks = (store.get(f"said {each}").decode() for each in range(world_size))
        store.set("refusal", next(filter(None, of_ranks), ""))
    if not (refusal := store.get("refusal").decode()):
        return
    store.set(f"read {rank}", "")
    if rank == 0:
        # It may serve the store to the others.
        store.wait([f"read {each}" for each in range(world_size)])
    raise NoStartError(refusal)
