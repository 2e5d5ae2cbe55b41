"""Command lines of the roll-out, derived from the pilot's command line."""

from __future__ import annotations

import re
import shlex

from moepp_megatron.workbench.experiments.pilot.result import ArmOutcome, PilotResult
from moepp_megatron.workbench.experiments.pilot.runs import run_name

_SETTING = re.compile(r"^[a-z_]+\.[a-z_0-9.]+=")
# What Slurm's scripts and configs/ take for a node.
_GPUS_PER_NODE = 8


class Commands:
    """Shell lines for each stage.

    Args:
        result: The pilot.
        outcome: Outcome of the arm to continue with.
    """

    def __init__(self, result: PilotResult, outcome: ArmOutcome) -> None:
        self._result = result
        self._arm, self._seeds = outcome.arm, outcome.seeds
        self._words = _split(result.setting.command)

    def pilot(self) -> list[str]:
        """The pilot itself and, where it had none, how to ask for a target."""
        command = self._result.setting.command
        if self._result.target is not None:
            return [command]
        return [
            command,
            "# the same with a target: what it would mean on your GPUs",
            asking(self._result),
        ]

    def node(self) -> list[str]:
        """Commands for one node with 8 GPUs: a run of the pilot itself, on other ranks."""
        run = self._run_config()
        guard = "routing_guard.enabled=true routing_guard.dry_run=true"
        nproc = f"--nproc {_GPUS_PER_NODE}"
        return [
            f"moepp doctor {run} {nproc}",
            f"moepp train {run} {nproc} --dry-run",
            "# if the batch does not divide: training.micro_batch_size=1 keeps the pilot's batch",
            f"moepp scale {run} {nproc} --out scaling-node",
            f"moepp train {run} run.dir=runs/node {guard} {nproc}",
            "moepp monitor runs/node",
        ]

    def cluster(self) -> list[str]:
        """Commands for the target's nodes; `N` nodes without a target."""
        target = self._result.target
        nodes, plan = "N", "--gpus GPUS"
        if target is not None:
            nodes = str(-(-target.gpus // _GPUS_PER_NODE))
            plan = (
                f"--gpus {target.gpus} --gpu {shlex.quote(target.gpu)} --tokens {target.tokens:g}"
            )
            if target.price_per_hour is not None:
                plan += f" --price {target.price_per_hour:g}"
        return [
            f"moepp plan {self._target_arm()} {plan} --out planned.yaml",
            f"sbatch --nodes={nodes} slurm/preflight.sbatch",
            f"sbatch --nodes={nodes} slurm/scaling.sbatch planned.yaml /shared/scaling",
            f"moepp slurm planned.yaml --nodes {nodes} run.dir=/shared/runs/first "
            "routing_guard.enabled=true routing_guard.dry_run=true",
            "# prints the script; with --submit behind it, submits it",
        ]

    def _run_config(self) -> str:
        folder = _option(self._words, "--out") or "DIR"
        seed = min(self._seeds, default=0)
        return shlex.quote(f"{folder}/configs/{run_name(self._arm, seed)}.yaml")

    def _target_arm(self) -> str:
        """The target's configuration with the arm's settings."""
        target = self._result.target
        settings = self._arm.overrides
        config = _option(self._words, "--target") or "TARGET_CONFIG"
        if target is None or target.name == self._result.setting.config:
            config = _positional(self._words) or "CONFIG"
            # What was set on the command line belongs to that configuration.
            settings = [*filter(_SETTING.match, self._words), *settings]
        return shlex.join([config, *settings])


def asking(result: PilotResult) -> str:
    """How to ask for a target: the pilot's command with GPUs."""
    return f"{result.setting.command} --gpus GPUS --gpu h100"


def _option(words: list[str], name: str) -> str | None:
    """The value of an option, given as `--name value` or `--name=value`."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        key, _, value = word.partition("=")
        if key == name:
            return value or following or None
    return None


def _split(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:
        # An open quote: shown as it is, but nothing can be taken from it.
        return []


def _positional(words: list[str]) -> str | None:
    """The word behind `pilot`, if it is no option."""
    if "pilot" not in words[:-1]:
        return None
    word = words[words.index("pilot") + 1]
    return None if word.startswith("-") else word
