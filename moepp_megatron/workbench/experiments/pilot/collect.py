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
from moepp_megatron.workbench.experiments.pilot import schedule
from moepp_megatron.workbench.experiments.pilot.evidence import Evidence
from moepp_megatron.workbench.experiments.pilot.outcome import (
    RunOutcome,
    arm_outcome,
    log_time_ratio,
)
from moepp_megatron.workbench.experiments.pilot.pooled import PooledLosses
from moepp_megatron.workbench.experiments.pilot.procedure import Pilot
from moepp_megatron.workbench.experiments.pilot.result import PilotResult, Setting
from moepp_megatron.workbench.experiments.pilot.verdict import sentence, verdict

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
    count = len(runs[pilot.base[0].arm.name])
    if count == 0:
        return None
    look = schedule.look_of(count, pilot.plan.first)
    if look > 0:
        # Decided by the runs of the look only: one seed more is not another look.
        used = look * pilot.plan.first
        runs = {arm: dict(list(seeds.items())[:used]) for arm, seeds in runs.items()}
    losses = PooledLosses(
        {arm: {seed: run.valid_loss for seed, run in seeds.items()} for arm, seeds in runs.items()}
    )
    names = {arm.arm.kind: arm.arm.name for arm in pilot.arms}
    log_tokens = math.log(pilot.arm("vanilla").arm.steps / pilot.arm("short").arm.steps)
    evidence = Evidence.of(losses, names, log_tokens, pilot.plan.speed)
    in_runs = log_time_ratio(runs[names["moepp"]], runs[names["vanilla"]])
    level = schedule.level(max(look, 1))
    found = verdict(evidence, pilot.plan.speed, in_runs, level if look else None)
    baseline = runs[names["vanilla"]]
    return PilotResult(
        setting=_setting(pilot, runs, look, level),
        arms=[
            arm_outcome(
                arm.arm,
                runs[arm.arm.name],
                baseline,
                None
                if arm.arm.kind == "vanilla"
                else losses.difference(arm.arm.name, names["vanilla"]).interval(),
            )
            for arm in pilot.arms
        ],
        token_value=evidence.token_value.interval(),
        verdict=found,
        sentence=sentence(found, None if look else pilot.plan.first),
    )


def _finished(pilot: Pilot) -> Outcomes:
    """Outcomes of the seeds that every arm has finished."""
    whole: dict[str, dict[int, RunOutcome]] = {arm.arm.name: {} for arm in pilot.arms}
    for seed in pilot.seeds:
        outcomes = {
            arm.arm.name: outcome
            for arm in pilot.arms
            if (outcome := pilot.folder.outcome(pilot.folder.run_of(arm, seed))) is not None
        }
        if len(outcomes) == len(pilot.arms):
            for name, outcome in outcomes.items():
                whole[name][seed] = outcome
    return whole


def _setting(pilot: Pilot, runs: Outcomes, look: int, level: float) -> Setting:
    training, model = pilot.arm("vanilla").config.training, pilot.config.model
    moepp, steps = pilot.arm("moepp").config, pilot.arm("vanilla").arm.steps
    per_step = training.global_batch_size * model.seq_length
    on_gpu = any(run.on_gpu for seeds in runs.values() for run in seeds.values())
    return Setting(
        command=pilot.command,
        config=moepp.run.name,
        tau=moepp.moe.balanced_tau,
        nproc=pilot.folder.nproc,
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
        began=min(
            pilot.folder.began(pilot.folder.run_of(arm, seed))
            for arm in pilot.arms
            for seed in runs[arm.arm.name]
        ),
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
