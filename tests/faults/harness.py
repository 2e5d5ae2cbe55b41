"""Runs a real training with the command line and kills its ranks.

Nothing is imported from torch here: the training is `moepp train` in processes of its own, which
are forked from the server of the test ranks or, cold, started as a shell starts them.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import yaml

from tests.commands import MODULE, Begun, captured, moepp, succeeded
from tests.parallel.training_runs import merged

Training = Begun | subprocess.Popen
# A dead rank is noticed, all are started anew and import megatron-core: seconds, more when busy.
_RESTART_TIMEOUT_S = 240.0
_POLL_S = 0.02


def prepare_data(folder):
    """A small corpus, prepared by the command line."""
    texts = folder / "texts"
    texts.mkdir()
    for index in range(60):
        words = " ".join(f"word{(index * j) % 97}" for j in range(400))
        (texts / f"{index:02d}.txt").write_text(words, encoding="ascii")
    data = folder / "data"
    succeeded(moepp("data", "prepare", texts, "--out", data, "--vocab-size", "320"))
    return data


def write_config(path, data, run, num_ranks, save_interval=5, *, sections=None, **training):
    """A tiny expert-parallel model that takes some hundredths of a second a step.

    `sections` are merged into the configuration.
    """
    config = {
        "run": {"dir": str(run)},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            "seq_length": 32,
            "vocab_size": 320,
        },
        "moe": {"num_ffn_experts": 4},
        "parallel": {"expert_model_parallel_size": num_ranks},
        "data": {"path": str(data)},
        "optimizer": {"lr": 1.0e-3},
        "training": {
            "train_iters": 60,
            "global_batch_size": 8,
            "micro_batch_size": 1,
            "eval_iters": 0,
            **training,
        },
    }
    if save_interval:
        saving = {"save_interval": save_interval, "async_save": True, "keep": 2}
        config["checkpoint"] = saving
    path.write_text(yaml.safe_dump(merged(config, sections or {})), encoding="ascii")
    return path


def short_steps(num_ranks):
    """For `write_config`: steps of one micro-batch on each rank."""
    return {"global_batch_size": 4, "micro_batch_size": 4 // num_ranks}


@contextmanager
def training(config, num_ranks, max_restarts=0, is_cold=False):
    """`moepp train` in the background; whatever is left of it is killed at the end."""
    words = ["-m", MODULE, "train", str(config), "--nproc", str(num_ranks)]
    if max_restarts:
        words += ["--max-restarts", str(max_restarts)]
    log = config.with_suffix(".log")
    if is_cold:
        with log.open("ab") as output:
            process = subprocess.Popen([sys.executable, *words], stdout=output, stderr=output)
    else:
        process = Begun(words, log)
    with _until_the_end(process):
        yield process


@contextmanager
def going_on(command, config):
    """As `training`, by a line that a run has printed for a shell; the log begins anew."""
    log = config.with_suffix(".log")
    log.write_bytes(b"")
    taken_apart = ["bash", "-c", f"printf '%s\\0' {command}"]
    read = captured(taken_apart, check=True).stdout
    interpreter, *words = read.split("\0")[:-1]
    assert interpreter == sys.executable
    process = Begun(words, log)
    with _until_the_end(process):
        yield process


@contextmanager
def _until_the_end(process):
    try:
        yield
    finally:
        for left in descendants(process.pid):
            left.kill()
        process.kill()
        process.wait()


def wait_until(happened, said=str):
    """Ask again and again, on a busy machine for minutes; `said` is for the failure."""
    deadline = time.monotonic() + _RESTART_TIMEOUT_S
    while not happened():
        assert time.monotonic() < deadline, said()
        time.sleep(_POLL_S)


def wait_for_step(process, run, step, log):
    """Until a run has logged a step; fails if it has ended before."""

    def reached():
        assert process.poll() is None, log.read_text(errors="replace")[-5000:]
        return max(losses(run), default=0) >= step

    wait_until(reached, lambda: log.read_text(errors="replace")[-5000:])


def losses(run):
    """Loss by step from metrics.jsonl; an unfinished last line is left out."""
    try:
        lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    except OSError:
        return {}
    records = [json.loads(line) for line in lines if line]
    return {record["step"]: record["loss"] for record in records}


def ranks_of(process):
    """The rank processes: what the launcher's only child, torchrun, has started."""
    try:
        agents = psutil.Process(process.pid).children()
        return [rank for agent in agents for rank in agent.children()]
    except psutil.NoSuchProcess:
        return []


@dataclass
class Kills:
    """The signals sent to a run."""

    hit: int = 0
    during_save: int = 0
    recovery_s: list[float] = field(default_factory=list)


def kill_some(process, run, kills, last_step, chance):
    """Kill a random rank `kills` times, some of them while a checkpoint is being written."""
    done = Kills()
    while done.hit < kills and process.poll() is None:
        # What an earlier kill left behind is no save that is under way.
        stale = _incomplete(run)
        in_save = chance.random() < 0.4
        if not _wait_for_moment(process, run, stale if in_save else None, last_step, chance):
            break
        victims = ranks_of(process)
        if not victims:
            continue
        saving = bool(_incomplete(run) - stale)
        try:
            chance.choice(victims).send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
        done.hit += 1
        done.during_save += saving
        done.recovery_s.append(_wait_for_step(process, run))
    return done


def _wait_for_step(process, run):
    """Seconds until the run, all of whose ranks are dead or dying, has taken another step."""
    killed = time.monotonic()
    # The first rank may still be writing the step that was under way.
    while ranks_of(process) and time.monotonic() - killed < 0.5:
        time.sleep(_POLL_S)
    seen = _modified(run)
    while _modified(run) == seen:
        if process.poll() is not None:
            break
        assert time.monotonic() - killed < _RESTART_TIMEOUT_S, "no step after a rank was killed"
        time.sleep(_POLL_S)
    return time.monotonic() - killed


def _wait_for_moment(process, run, stale, last_step, chance):
    """Until a save begins, or a random moment within the next steps; False if the run ended before.

    Args:
        process: The launcher.
        run: The run's folder.
        stale: Unfinished checkpoints to ignore where a save is waited for; None for any moment.
        last_step: Where the run ends.
        chance: Decides the moment.
    """
    # Steps since the newest in the log, and a part of the next: most reach beyond a save.
    target = max(losses(run), default=0) + chance.randint(1, 12)
    delay = chance.uniform(0.0, 0.1)
    deadline = time.monotonic() + _RESTART_TIMEOUT_S
    while time.monotonic() < deadline:
        step = max(losses(run), default=0)
        if process.poll() is not None or step >= last_step:
            return False
        if stale is not None and _incomplete(run) - stale:
            return True
        if stale is None and step >= target:
            time.sleep(delay)
            return True
        time.sleep(_POLL_S)
    raise AssertionError(f"no moment to kill within {_RESTART_TIMEOUT_S:g} s")


def _incomplete(run):
    """Names of checkpoints that are being written, or that nobody finished."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return set()
    return {name for name in os.listdir(folder) if name.startswith(".")}


def _modified(run):
    try:
        return (run / "metrics.jsonl").stat().st_mtime_ns
    except OSError:
        return 0


def descendants(pid):
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
