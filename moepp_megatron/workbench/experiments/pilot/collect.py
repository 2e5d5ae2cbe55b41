"""Computes a pilot's result, the content of pilot.json, from its finished runs."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from moepp_megatron.config.parameters import count_parameters
from moepp_megatron.runtime.nvml import Nvml, NvmlUnavailableError
from moepp_megatron.workbench.experiments.pilot import schedule, sentences
from moepp_megatron.workbench.experiments.pilot.evidence import Evidence, Names
from moepp_megatron.workbench.experiments.pilot.extrapolate import measured_routing
from moepp_megatron.workbench.experiments.pilot.outcome import RunOutcome, arm_outcome
from moepp_megatron.workbench.experiments.pilot.pooled import PooledLosses
from moepp_megatron.workbench.experiments.pilot.procedure import Pilot
from moepp_megatron.workbench.experiments.pilot.result import (
    Arm,
    ArmOutcome,
    ArmVerdict,
    EqualCompute,
    PilotResult,
    PilotTarget,
    Setting,
)
from moepp_megatron.workbench.experiments.pilot.schedule import look_of
from moepp_megatron.workbench.experiments.pilot.verdict import (
    AtTarget,
    by_favour,
    recommended,
    verdict,
)
from moepp_megatron.workbench.planning.imbalance import AssumedRouting

Runs = Mapping[int, RunOutcome]


def result_of(pilot: Pilot) -> PilotResult | None:
    """The result of the seeds that every arm has finished.

    None before the MoE++ arms were timed, and where no seed is finished.

    Raises:
        RunFailed: If a finished run has diverged.
    """
    if len(pilot.plan.matches) < len(pilot.moepp):
        return None
    found = _outcomes(pilot)
    if not found:
        return None
    look = look_of(len(found), pilot.plan.first)
    if look > 0:
        # Decided by the runs of the look alone: one seed more is not another look.
        found = dict(list(found.items())[: look * pilot.plan.first])
    return _Measured(pilot, found, look).result()


def _outcomes(pilot: Pilot) -> dict[int, dict[str, RunOutcome]]:
    """Outcomes by finished seed and arm."""
    whole = {}
    for seed in pilot.seeds:
        outcomes = {
            arm.arm.name: pilot.folder.outcome(pilot.folder.run_of(arm, seed)) for arm in pilot.arms
        }
        if all(found is not None for found in outcomes.values()):
            whole[seed] = {name: found for name, found in outcomes.items() if found is not None}
    return whole


class _Measured:
    """The whole seeds of a pilot."""

    def __init__(
        self, pilot: Pilot, outcomes: Mapping[int, Mapping[str, RunOutcome]], look: int
    ) -> None:
        self.pilot, self.seeds, self.look = pilot, list(outcomes), look
        self.runs: dict[str, dict[int, RunOutcome]] = {
            arm.arm.name: {seed: found[arm.arm.name] for seed, found in outcomes.items()}
            for arm in pilot.arms
        }
        self.losses = PooledLosses(
            {
                name: {seed: run.valid_loss for seed, run in runs.items()}
                for name, runs in self.runs.items()
            }
        )
        vanilla, short = pilot.base[0].arm, pilot.base[-1].arm
        assert (vanilla.kind, short.kind) == ("vanilla", "short"), "the order of build_arms"
        self.vanilla, self.short = vanilla, short
        self.outcomes = {arm.arm.name: self._outcome(arm.arm) for arm in pilot.arms}
        self.level = schedule.level(max(look, 1), len(pilot.moepp))

    def _outcome(self, arm: Arm) -> ArmOutcome:
        """The outcome of an arm; the time ratio of MoE++ is that of the sessions."""
        difference = None
        if arm.kind != "vanilla":
            difference = self.losses.difference(arm.name, self.vanilla.name).interval()
        found = arm_outcome(arm, self.runs[arm.name], self.runs[self.vanilla.name], difference)
        match = self.pilot.plan.matches.get(arm.matches or arm.name)
        if match is None or arm.kind == "narrow":
            return found
        return found.model_copy(update={"time_ratio": match.speed.factor()})

    def result(self) -> PilotResult:
        evidence = {arm.arm.name: self._evidence(arm.arm) for arm in self.pilot.moepp}
        routing = self._routing()
        target = self._target(routing)
        verdicts = by_favour(
            [
                verdict(
                    self.outcomes[name],
                    found,
                    self.level if self.look else None,
                    None if target is None else _at_target(name, target),
                )
                for name, found in evidence.items()
            ]
        )
        setting = self._setting()
        return PilotResult(
            setting=setting,
            arms=list(self.outcomes.values()),
            token_value=next(iter(evidence.values())).token_value.interval(),
            equal_compute=self._equal_compute(),
            target=target,
            verdicts=verdicts,
            recommended=recommended(verdicts),
            answer=self._answer(verdicts, target),
            caveats=sentences.caveats(
                self.pilot.folder.nproc,
                not self._on_gpu(),
                len(self.seeds),
                setting.steps,
                setting.tokens,
                None if target is None else _routing_words(routing),
            ),
        )

    def _matching(self, arm: Arm, kind: str) -> Arm:
        found = (one.arm for one in self.pilot.matched if one.arm.matches == arm.name)
        return next(one for one in found if one.kind == kind)

    def _evidence(self, arm: Arm) -> Evidence:
        names = Names(
            vanilla=self.vanilla.name,
            short=self.short.name,
            moepp=arm.name,
            equal_time=self._matching(arm, "equal_time").name,
            narrow=self._matching(arm, "narrow").name,
        )
        log_tokens = math.log(self.vanilla.steps / self.short.steps)
        speed = self.pilot.plan.matches[arm.name].speed
        return Evidence.of(self.losses, names, log_tokens, speed)

    def _equal_compute(self) -> list[EqualCompute]:
        pairs = [(a.arm.name, self._matching(a.arm, "narrow").name) for a in self.pilot.moepp]
        more = [arm.arm.name for arm in self.pilot.base if arm.arm.kind == "more"]
        pairs += [(name, self.vanilla.name) for name in more]
        return [
            EqualCompute(
                arm=arm,
                other=other,
                loss_difference=self.losses.difference(arm, other).interval(),
            )
            for arm, other in pairs
        ]

    def _routing(self) -> dict[str, AssumedRouting] | None:
        """Routing by arm, as uneven as in its runs; None if that does not apply to the target."""
        if self.pilot.target is None:
            return None
        found = {}
        for arm in self.pilot.arms:
            runs = [self.pilot.folder.run_of(arm, seed) for seed in self.seeds]
            routing = measured_routing(runs, self.pilot.target.config)
            if routing is None:
                return None
            found[arm.arm.name] = routing
        return found

    def _target(self, routing: dict[str, AssumedRouting] | None) -> PilotTarget | None:
        if self.pilot.target is None:
            return None
        nominal = {arm.arm.name: arm.config.moe.ffn_share for arm in self.pilot.arms}
        return self.pilot.target.extrapolate(list(self.outcomes.values()), nominal, routing)

    def _answer(self, verdicts: Sequence[ArmVerdict], target: PilotTarget | None) -> str:
        where = "" if target is None else target.title
        first = None if self.look else self.pilot.plan.first
        return sentences.answer(verdicts[0], target is not None, where, first)

    def _on_gpu(self) -> bool:
        """Whether the runs used GPUs."""
        return any(run.on_gpu for runs in self.runs.values() for run in runs.values())

    def _began(self) -> str:
        """Day of the first run."""
        folder = self.pilot.folder
        return min(
            folder.began(folder.run_of(arm, seed)) for arm in self.pilot.arms for seed in self.seeds
        )

    def _setting(self) -> Setting:
        pilot = self.pilot
        vanilla = pilot.base[0]
        training, model = vanilla.config.training, vanilla.config.model
        moepp = pilot.moepp[0]
        per_step = training.global_batch_size * model.seq_length
        return Setting(
            command=pilot.command,
            config=moepp.config.run.name,
            nproc=pilot.folder.nproc,
            device=_gpu() if self._on_gpu() else _processor(),
            cores=len(os.sched_getaffinity(0)),
            # Without importing them, which takes seconds.
            torch=version("torch"),
            megatron_core=version("megatron-core"),
            steps=vanilla.arm.steps,
            tokens=vanilla.arm.steps * per_step,
            valid_tokens=training.eval_iters * per_step,
            parameters=count_parameters(moepp.config).total,
            began=self._began(),
            sessions=pilot.plan.sessions,
            look=self.look,
            next_seeds=(self.look + 1) * pilot.plan.first,
            level=self.level,
        )


def _at_target(name: str, target: PilotTarget) -> AtTarget:
    model = target.model_of(name)
    return AtTarget(None if model is None else model.time_ratio)


def _routing_words(routing: object | None) -> str:
    if routing is None:
        return "routing as uneven as after long training (docs/planning.md)"
    return "routing as uneven as in the second half of the pilot's runs, which long training evens"


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
