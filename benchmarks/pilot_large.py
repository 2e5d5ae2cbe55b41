"""Does MoE++ pay? The large pilot, by the procedure of `moepp pilot`, in pieces of any length.

    python -m benchmarks.pilot_large OUT --work K --until HH:MM   # UTC; two workers may share OUT
    python -m benchmarks.pilot_large OUT --time                   # the sessions, on an idle machine
    python -m benchmarks.pilot_large OUT --work K --factors      # what changes the answer
    python -m benchmarks.pilot_large OUT --table

Models of 4 layers, 96 wide, learn from Python sources (`pilot_corpus`) for 1,000 steps of 2,048
tokens. Arms, statistics, sessions, looks and verdict are those of `moepp pilot --seeds 5`
(workbench/experiments/pilot); narrowed vanilla is trained as soon as its width is known, before the
sessions. A worker takes the next run that nobody has, and goes on from its checkpoint if it has
one. A finished run leaves one small file in benchmarks/results/pilot_large, so that a fresh clone
goes on where these end. They hold the hash of all settings; runs of other settings are refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pilot_corpus import prepare_corpus
from benchmarks.pilot_factors import factor_runs, factors_table
from benchmarks.pilot_table import print_state
from moepp_megatron.config import Config, ConfigError, load_config
from moepp_megatron.config.yaml_file import read_mapping
from moepp_megatron.runtime.atomic import write_result
from moepp_megatron.runtime.launch import LaunchOptions
from moepp_megatron.training.occupancy import refuse_running
from moepp_megatron.workbench.experiments.pilot.arms import (
    PilotArm,
    build_arms,
    configured_tau,
    matched_arms,
    narrow_width,
)
from moepp_megatron.workbench.experiments.pilot.outcome import RunOutcome
from moepp_megatron.workbench.experiments.pilot.plan import Plan
from moepp_megatron.workbench.experiments.pilot.procedure import Pilot
from moepp_megatron.workbench.experiments.pilot.result import Curve
from moepp_megatron.workbench.experiments.pilot.runs import PilotRun, PilotRuns
from moepp_megatron.workbench.experiments.pilot.sessions import SpeedSessions
from moepp_megatron.workbench.experiments.runs import Interrupted, RunFailed
from moepp_megatron.workbench.report.terminal import wide_console

HERE = Path(__file__).parent
_SAVE_INTERVAL = 100
# The seeds whose runs come first.
_EARLY = 3


@dataclass(frozen=True)
class Study:
    """What decides the numbers.

    Attributes:
        file: The configuration; data and folders are set here.
        steps: Steps of a run.
        seeds: Number of seeds, all of them in the first look.
        eval_iters: Global batches of validation.
        sources: Sources of the corpus.
        sessions: Sessions that time MoE++.
    """

    file: Path = HERE / "pilot_large.yaml"
    steps: int = 1000
    seeds: int = 5
    eval_iters: int = 64
    sources: tuple[str, ...] = (
        *("stdlib", "torch", "megatron-core", "numpy", "scipy"),
        *("sympy", "scikit-learn", "matplotlib", "networkx"),
    )
    sessions: int = 5

    def digest(self, corpus: dict[str, Any]) -> str:
        """SHA-256 of all that decides a run's numbers, but for the code; plan.json has the rest."""
        content = [read_mapping(self.file), self.steps, self.eval_iters, corpus]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class LargeRuns(PilotRuns):
    """The runs on disk: at work in OUT, finished in `results`.

    Args:
        path: OUT.
        results: Folder of one JSON per finished run.
        digest: Hash of the settings.
    """

    def __init__(self, path: Path, results: Path, digest: str) -> None:
        super().__init__(path)
        self.results, self.digest = results, digest

    def placed(self, name: str, config: Config) -> Config:
        """With checkpoints, for workers that end at a given time."""
        placed = super().placed(name, config)
        # As `--resume` has it.
        kept = {"save_interval": _SAVE_INTERVAL, "keep": 1, "load": "auto"}
        return placed.model_copy(update={"checkpoint": placed.checkpoint.model_copy(update=kept)})

    def is_done(self, run: PilotRun) -> bool:
        """Whether it has left its file."""
        return self._found(run) is not None

    def outcome(self, run: PilotRun) -> RunOutcome | None:
        """From its file."""
        found = self._found(run)
        if found is None:
            return None
        curve = Curve.model_validate(found["outcome"].pop("curve"))
        return RunOutcome(**found["outcome"], curve=curve)

    def began(self, run: PilotRun) -> str:
        """From its file."""
        found = self._found(run)
        assert found is not None, "asked of finished runs only"
        return str(found["began"])

    def do(self, run: PilotRun) -> None:
        """Train, from the newest checkpoint on, and leave the file."""
        self.claim([run])
        refuse_running(Path(run.config.run.dir))
        options = LaunchOptions(self.nproc, stoppable=True, output=self.log(run))
        reason = self.launch(run, options, ["train", "--resume", "--", str(self.config_file(run))])
        outcome = None if reason else super().outcome(run)
        if outcome is None:
            raise RunFailed(f"run {run.name} failed: {reason or 'no loss'}; see {self.log(run)}")
        values = {
            field.name: getattr(outcome, field.name)
            for field in dataclasses.fields(outcome)
            if field.name != "curve"
        }
        values["curve"] = outcome.curve.model_dump()
        content = {"settings": self.digest, "began": super().began(run), "outcome": values}
        write_result(self.results / f"{run.name}.json", json.dumps(content).encode() + b"\n")

    def work_on(self, run: PilotRun) -> bool:
        """Do the run if nobody else has it; False otherwise."""
        lock = self.path / "logs" / f"{run.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._alone(lock):
                if not self.is_done(run):
                    self.do(run)
                    return True
        except ConfigError as error:
            if "at a time" not in str(error):
                raise
        return False

    def _found(self, run: PilotRun) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self.results / f"{run.name}.json").read_bytes())
        except FileNotFoundError:
            return None
        if found["settings"] != self.digest:
            raise self.other_settings(f"those of {run.name} in {self.results} differ")
        return found


def open_pilot(out: Path, results: Path, study: Study) -> Pilot:
    """The pilot, with the corpus and the configurations of its runs in OUT.

    Raises:
        ConfigError: The results are of other settings, or a source is missing.
    """
    out = out.resolve()
    vocab_size = load_config(study.file).model.vocab_size
    corpus = prepare_corpus(out / "corpus", study.sources, vocab_size)
    config = load_config(study.file, [f"data.path={out / 'corpus' / 'data'}"])
    folder = LargeRuns(out, results, study.digest(corpus))
    _claim_settings(folder, corpus)
    base = build_arms(config, study.steps, [configured_tau(config)], study.eval_iters)
    names = [arm.arm.name for arm in base if arm.arm.kind == "moepp"]
    wanted = Plan(first=study.seeds, arms=names, sessions=study.sessions)
    first = config.training.seed
    return Pilot(
        folder=folder,
        config=config,
        base=base,
        seeds=range(first, first + study.seeds),
        plan=Plan.claim(results, wanted),
        command="python -m benchmarks.pilot_large",
        eval_iters=study.eval_iters,
    )


def _claim_settings(folder: LargeRuns, corpus: dict[str, Any]) -> None:
    file = folder.results / "settings.json"
    if not file.exists():
        content = {"settings": folder.digest, "corpus": corpus}
        write_result(file, json.dumps(content, indent=1).encode())
    if json.loads(file.read_bytes())["settings"] != folder.digest:
        raise folder.other_settings(f"those of {file} differ")


def known_arms(pilot: Pilot) -> list[PilotArm]:
    """All arms that can be trained: narrowed vanilla once its width is known."""
    if pilot.matched:
        return list(pilot.arms)
    found = list(pilot.base)
    for arm in pilot.moepp:
        share = pilot.ffn_share(arm)
        if share is not None:
            width = narrow_width(pilot.config, share)
            found += matched_arms(pilot.config, arm, arm.arm.steps, width, pilot.eval_iters)[1:]
    return found


def runs_in_order(pilot: Pilot) -> list[PilotRun]:
    """Early seeds of the first arms, what decides the width, early seeds of all, the rest."""
    early, arms = pilot.seeds[:_EARLY], known_arms(pilot)
    rounds = [(pilot.base, early), (pilot.moepp, pilot.seeds), (arms, early), (arms, pilot.seeds)]
    runs = [run for members, seeds in rounds for run in pilot.folder.all_of(members, seeds)]
    return list({run.name: run for run in runs}.values())


def work(
    open_it: Callable[[], Pilot],
    most: int,
    is_over: Callable[[], bool],
    runs: Callable[[Pilot], list[PilotRun]] = runs_in_order,
) -> list[str]:
    """Do up to `most` of `runs`; the names of those that were finished.

    Raises:
        Interrupted: Asked to stop in a run, whose checkpoint is kept.
        RunFailed: A run failed.
    """
    finished: list[str] = []
    while len(finished) < most and not is_over():
        pilot = open_it()
        folder = pilot.folder
        assert isinstance(folder, LargeRuns), "open_pilot makes no others"
        missing = folder.unfinished(runs(pilot))
        done = next((run for run in missing if folder.work_on(run)), None)
        if done is None:
            break
        finished.append(done.name)
        print(f"{datetime.datetime.now(datetime.UTC):%H:%M} {done.name}", flush=True)
    return finished


def time_sessions(pilot: Pilot, results: Path) -> None:
    """Time MoE++ beside vanilla, and keep what follows from it."""
    timed = SpeedSessions(pilot.folder.path, pilot.folder.nproc)
    sessions = pilot.sessions()
    if not sessions and not pilot.matched:
        raise ConfigError("--time must come after the runs of MoE++; give --work first")
    pilot.folder.claim(runs_in_order(pilot))
    with timed.writing():
        timed.run_missing(sessions, print)
    pilot.matching(timed).plan.write(results)


def _deadline(text: str | None) -> datetime.datetime:
    """The next time of day `text`, UTC."""
    now = datetime.datetime.now(datetime.UTC)
    if text is None:
        return now + datetime.timedelta(days=365)
    try:
        clock = datetime.time.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"--until ({text}) must be a time of day, UTC; use 21:05") from None
    at = datetime.datetime.combine(now.date(), clock, datetime.UTC)
    return at if at > now else at + datetime.timedelta(days=1)


def _work_until(do: Callable[[Callable[[], bool]], object], until: datetime.datetime) -> None:
    """Call `do` with what tells whether the time is over; have it interrupted then."""

    def left() -> float:
        return (until - datetime.datetime.now(datetime.UTC)).total_seconds()

    # A worker that is asked to end saves a checkpoint.
    timer = threading.Timer(min(left(), 1e6), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        do(lambda: left() < 1)
    except Interrupted as stop:
        print(stop)
    finally:
        timer.cancel()


def main(arguments: Sequence[str] | None = None) -> None:
    """Work, time or print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=int, metavar="K", help="do up to K runs")
    parser.add_argument("--factors", action="store_true", help="with --work: those of FACTORS")
    parser.add_argument("--until", metavar="HH:MM", help="stop then, UTC")
    parser.add_argument("--time", action="store_true", help="time MoE++ on an idle machine")
    parser.add_argument("--table", action="store_true", help="print what is there")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "pilot_large")
    options = parser.parse_args(arguments)
    open_it = functools.partial(open_pilot, options.out, options.results, Study())
    try:
        if options.work is not None:
            runs = factor_runs if options.factors else runs_in_order
            _work_until(
                lambda is_over: work(open_it, options.work, is_over, runs),
                _deadline(options.until),
            )
        if options.time:
            time_sessions(open_it(), options.results)
        if options.table:
            pilot = open_it()
            print_state(pilot, known_arms(pilot))
            wide_console().print(factors_table(pilot))
    except (ConfigError, RunFailed) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
