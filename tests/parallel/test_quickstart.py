"""The quickstart: the commands that its script runs are those that the docs show, and they run."""

import json
import os
import re
import shlex
import shutil
import subprocess

from tests import ROOT
from tests.commands import moepp

_ENV = """
MOEPP_ROOT={root}
MOEPP_BIN={root}/bin
"""
_MOEPP = """#!/usr/bin/env bash
printf '%q ' "$@" >>calls && echo >>calls
"""


def _commands(folder, gpus, *arguments):
    """Arguments of each `moepp` that launch/quickstart.sh calls on a machine with `gpus` GPUs."""
    (folder / "launch").mkdir()
    (folder / "bin").mkdir()
    for name in ("quickstart.sh", "ranks.sh"):
        shutil.copy(ROOT / "launch" / name, folder / "launch")
    (folder / "launch/env.sh").write_text(_ENV.format(root=shlex.quote(str(folder))))
    listed = "".join(f"echo 'GPU {index}: made up'\n" for index in range(gpus))
    for name, text in {"moepp": _MOEPP, "nvidia-smi": f"#!/bin/sh\n{listed}exit 0\n"}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    script = [str(folder / "launch/quickstart.sh"), *arguments]
    # Tests hide the GPUs of their machine, and these are others.
    environment = {key: value for key, value in os.environ.items() if "VISIBLE" not in key}
    environment["PATH"] = path
    subprocess.run(script, check=True, env=environment, stdout=subprocess.DEVNULL)
    return [shlex.split(line) for line in (folder / "calls").read_text().splitlines()]


def test_the_docs_show_what_the_script_runs(tmp_path):
    page = (ROOT / "docs/tutorials/first_run.md").read_text(encoding="utf-8")
    block = re.search(r"## What it does.*?```bash\n(.*?)```", page, re.DOTALL)
    assert block, "first_run.md has no commands"
    lines = block[1].splitlines()
    shown = [shlex.split(line) for line in lines if line.startswith("moepp ")]
    assert shown == [["moepp", *words] for words in _commands(tmp_path, gpus=0)]


def test_the_commands_run(tmp_path, monkeypatch):
    """One rank, as on a machine with one GPU, on a small text instead of the built-in corpus."""
    short = ("training.train_iters=2", "training.eval_iters=1", "optimizer.warmup_iters=1")
    small = ("training.global_batch_size=4", "model.num_layers=2", "model.seq_length=64")
    commands = _commands(tmp_path, 1, *short, *small)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    line = json.dumps({"text": "def main(words, lines):\n    return sorted(words)\n" * 20})
    (tmp_path / "text.jsonl").write_text(f"{line}\n" * 60)
    monkeypatch.chdir(tmp_path)
    assert [words[0] for words in commands] == ["data", "train", "report", "generate"]
    assert commands[0][:3] == ["data", "prepare", "stdlib"]
    commands[0][2] = "text.jsonl"
    commands[-1] += ["--max-new-tokens", "4"]
    for words in commands:
        done = moepp(*words)
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    assert done.stdout.startswith("def ")
    run = tmp_path / "runs/quickstart"
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
    assert (run / "report.html").is_file()
    assert any((run / "checkpoints").iterdir())
