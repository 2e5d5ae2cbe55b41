"""Computes a pilot's result, the content of pilot.json, from its finished runs."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from moepp_megatron.config.parameters import count_parameters
from moepp_megatron.runtime.nvml import Nvml, NvmlUnavailableError
from moepp_megatron.tools.experiments.pilot.outcome import (
    RunOutcome,
    arm_outcome,
    log_time_ratio,
)
from moepp_megatron.tools.experiments.pilot.procedure import Pilot
from moepp_megatron.tools.experiments.pilot.result import ArmSetting, Interval, PilotResult
from moepp_megatron.tools.experiments.pilot.statistics import PooledLosses
from moepp_megatron.tools.experiments.pilot.verdict import Evidence, level_of, sentence, verdict

# By arm and seed.
Outcomes = Mapping[str, Mapping[int, RunOutcome]]


def result_of(pilot: Pilot) -> PilotResult | None:
    """The result of the seeds that every arm has finished.

    None before MoE++ was timed, and where no seed is finished.

    Raises:
        RunFailed: If a finished run has diverged.
    """
    if pilot.plan.match is None:
        return None
    runs = _finished(pilot)
    names = {arm.arm.kind: arm.arm.name for arm in pilot.arms}
    count = len(runs[names["vanilla"]])
    if count == 0:
        return None
    look = count // pilot.plan.first
    if look > 0:
        # Decided by the runs of the look only: one seed more is not another look.
        used = look * pilot.plan.first
        runs = {arm: dict(list(seeds.items())[:used]) for arm, seeds in runs.items()}
    losses = PooledLosses(
        {arm: {seed: run.valid_loss for seed, run in seeds.items()} for arm, seeds in runs.items()}
    )
    log_tokens = math.log(pilot.arm("vanilla").arm.steps / pilot.arm("short").arm.steps)
    evidence = Evidence.of(losses, names, log_tokens, pilot.plan.speed)
    baseline = runs[names["vanilla"]]
    in_runs = log_time_ratio(runs[names["moepp"]], baseline)
    level = level_of(max(look, 1))
    found = verdict(evidence, pilot.plan.speed, in_runs, level if look else None)

    def difference(name: str) -> Interval | None:
        if name == names["vanilla"]:
            return None
        return losses.difference(name, names["vanilla"]).interval()

    return PilotResult(
        setting=_setting(pilot, runs, look, level),
        arms=[
            arm_outcome(arm.arm, runs[arm.arm.name], baseline, difference(arm.arm.name))
            for arm in pilot.arms
        ],
        token_value=evidence.token_value.interval(),
        verdict=found,
        sentence=sentence(found, None if look else pilot.plan.first),
    )


def _finished(pilot: Pilot) -> Outcomes:
    """Outcomes of the seeds that every arm has finished."""
    by_seed: dict[int, dict[str, RunOutcome]] = {seed: {} for seed in pilot.seeds}
    for run in pilot.runs:
        outcome = run.result()
        if outcome is not None:
            by_seed[run.seed][run.arm.name] = outcome
    whole = {seed: found for seed, found in by_seed.items() if len(found) == len(pilot.arms)}
    names = [arm.arm.name for arm in pilot.arms]
    return {name: {seed: found[name] for seed, found in whole.items()} for name in names}


def _setting(pilot: Pilot, runs: Outcomes, look: int, level: float) -> ArmSetting:
    training, model = pilot.arm("vanilla").config.training, pilot.config.model
    moepp, steps = pilot.arm("moepp").config, pilot.arm("vanilla").arm.steps
    per_step = training.global_batch_size * model.seq_length
    on_gpu = any(run.on_gpu for seeds in runs.values() for run in seeds.values())
    return ArmSetting(
        command=pilot.command,
        config=moepp.run.name,
        tau=moepp.moe.balanced_tau,
        nproc=pilot.nproc,
        device=_gpu() if on_gpu else _processor(),
        on_gpu=on_gpu,
        cores=len(os.sched_getaffinity(0)),
        # Without importing them, which takes seconds.
        torch=version("torch"),
        megatron_core=version("megatron-core"),
        steps=steps,
        tokens=steps * per_step,
        valid_tokens=training.eval_iters * per_step,
        parameters=count_parameters(moepp).total,
        began=min(run.began() for run in pilot.runs if run.seed in runs[run.arm.name]),
        sessions=pilot.plan.sessions,
        look=look,
        next_seeds=(look + 1) * pilot.plan.first,
        level=level,
    )


def _gpu() -> str:
    """Name of the GPUs that the runs have used, which this machine need not have."""
    try:
        with Nvml() as nvml:
            name = next((nvml.card(index).name for index in nvml.visible()), None)
    except NvmlUnavailableError:
        name = None
    return name or "GPU of another machine"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine() or "CPU"
