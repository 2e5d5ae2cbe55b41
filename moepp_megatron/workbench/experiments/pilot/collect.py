"""Computes a pilot's result, the content of pilot.json, from its finished runs."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from moepp_megatron.config.parameters import count_parameters
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.runtime.nvml import Nvml, NvmlUnavailableError
from moepp_megatron.workbench.experiments.pilot import sentences
from moepp_megatron.workbench.experiments.pilot.arms import PilotArm
from moepp_megatron.workbench.experiments.pilot.equal_speed import Runs, equal_speed, standing
from moepp_megatron.workbench.experiments.pilot.extrapolate import TargetRequest, measured_routing
from moepp_megatron.workbench.experiments.pilot.outcome import RunOutcome, arm_outcome, run_outcome
from moepp_megatron.workbench.experiments.pilot.result import (
    ArmVerdict,
    EqualSpeed,
    PilotResult,
    PilotTarget,
    Setting,
)
from moepp_megatron.workbench.experiments.pilot.runs import PilotRuns
from moepp_megatron.workbench.experiments.pilot.verdict import (
    AtTarget,
    TokenValue,
    by_favour,
    recommended,
    verdict,
)
from moepp_megatron.workbench.planning.imbalance import AssumedRouting

Records = list[StepMetrics]


@dataclass(frozen=True)
class Pilot:
    """A pilot, finished or not.

    Attributes:
        folder: Folder of its runs.
        arms: Vanilla first, "short" last.
        seeds: All seeds.
        command: The command line.
        target: Target to extrapolate to, or None.
    """

    folder: PilotRuns
    arms: Sequence[PilotArm]
    seeds: Sequence[int]
    command: str
    target: TargetRequest | None = None

    def result(self) -> PilotResult | None:
        """The result of the seeds that every arm has finished; None if there are none.

        Raises:
            RunFailed: If a finished run has diverged.
        """
        found = self._records()
        if not found:
            return None
        measured = _Measured(self, found)
        return measured.result()

    def _records(self) -> dict[int, dict[str, Records]]:
        """Records by finished seed and arm."""
        whole = {}
        for seed in self.seeds:
            records = {
                arm.arm.name: self.folder.records(self.folder.run_of(arm, seed))
                for arm in self.arms
            }
            if all(found is not None for found in records.values()):
                whole[seed] = {name: found for name, found in records.items() if found is not None}
        return whole


class _Measured:
    """The whole seeds of a pilot."""

    def __init__(
        self, pilot: Pilot, records: Mapping[int, Mapping[str, list[StepMetrics]]]
    ) -> None:
        self.pilot, self.records = pilot, records
        self.runs: dict[str, dict[int, RunOutcome]] = {}
        for arm in pilot.arms:
            folders = {seed: pilot.folder.run_of(arm, seed).config.run.dir for seed in records}
            self.runs[arm.arm.name] = {
                seed: run_outcome(found[arm.arm.name], folders[seed])
                for seed, found in records.items()
            }
        vanilla, short = pilot.arms[0].arm, pilot.arms[-1].arm
        assert (vanilla.kind, short.kind) == ("vanilla", "short"), "the order of build_arms"
        self.vanilla: Runs = self.runs[vanilla.name]
        self.value = TokenValue.of(self.vanilla, self.runs[short.name], vanilla.steps, short.steps)
        self.outcomes = {
            arm.arm.name: arm_outcome(arm.arm, self.runs[arm.arm.name], self.vanilla)
            for arm in pilot.arms
        }
        self.moepp = [arm.arm.name for arm in pilot.arms if arm.arm.kind == "moepp"]

    def result(self) -> PilotResult:
        equal = {name: self._equal_speed(name, self.runs) for name in self.moepp}
        routing = self._routing()
        target = self._target(routing)
        verdicts = by_favour([self._verdict(name, equal[name], target) for name in self.moepp])
        setting = self._setting()
        return PilotResult(
            setting=setting,
            arms=list(self.outcomes.values()),
            token_value=self.value.interval,
            equal_speed=list(equal.values()),
            target=target,
            verdicts=verdicts,
            recommended=recommended(verdicts),
            answer=self._answer(verdicts, equal, target),
            caveats=sentences.caveats(
                self.pilot.folder.nproc,
                not self._on_gpu(),
                len(self.records),
                setting.steps,
                setting.tokens,
                None if target is None else _routing_words(routing),
            ),
        )

    def _equal_speed(self, name: str, runs: Mapping[str, Runs]) -> EqualSpeed:
        kinds = {arm.arm.name: arm.arm.kind for arm in self.pilot.arms}
        baselines = {n: found for n, found in runs.items() if kinds[n] in ("vanilla", "rival")}
        return equal_speed(name, runs[name], baselines)

    def _verdict(self, name: str, equal: EqualSpeed, target: PilotTarget | None) -> ArmVerdict:
        return verdict(
            self.outcomes[name],
            self.runs[name],
            self.vanilla,
            self.value,
            equal,
            self.outcomes[equal.slower].step_time_s.mean,
            None if target is None else self._at_target(name, target),
        )

    def _at_target(self, name: str, target: PilotTarget) -> AtTarget:
        """The comparison at equal speed with the target's step times instead of the pilot's."""
        times = {model.arm: model.step_time_s for model in target.models if model.step_time_s}
        model = target.model_of(name)
        if model is None or model.time_ratio is None:
            return AtTarget(None)
        runs = {
            arm: {
                seed: dataclasses.replace(run, step_time_s=times[arm])
                for seed, run in self.runs[arm].items()
            }
            for arm in times
        }
        equal = self._equal_speed(name, runs)
        return AtTarget(model.time_ratio, equal, standing(equal, times[name], times[equal.slower]))

    def _routing(self) -> dict[str, AssumedRouting] | None:
        """Routing by arm, as uneven as in its runs; None if that does not apply to the target."""
        if self.pilot.target is None:
            return None
        found = {}
        for arm in self.pilot.arms:
            runs = [self.pilot.folder.run_of(arm, seed) for seed in self.records]
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

    def _answer(
        self,
        verdicts: Sequence[ArmVerdict],
        equal: Mapping[str, EqualSpeed],
        target: PilotTarget | None,
    ) -> str:
        best = verdicts[0]
        where = "" if target is None else target.title
        return sentences.answer(best, equal[best.arm], target is not None, where)

    def _on_gpu(self) -> bool:
        """Whether the runs used GPUs."""
        last = [records[-1] for seed in self.records.values() for records in seed.values()]
        return any(record.gpu_hours is not None for record in last)

    def _began(self) -> str:
        """Day of the first run: a run writes its configuration when it starts."""
        folder, first = self.pilot.folder, []
        for arm in self.pilot.arms:
            runs = [folder.run_of(arm, seed) for seed in self.records]
            first += [(run.config.run.dir / "config.yaml").stat().st_mtime for run in runs]
        return datetime.datetime.fromtimestamp(min(first), datetime.UTC).date().isoformat()

    def _setting(self) -> Setting:
        pilot = self.pilot
        vanilla = pilot.arms[0]
        training, model = vanilla.config.training, vanilla.config.model
        moepp = next(arm for arm in pilot.arms if arm.arm.kind == "moepp")
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
        )


def _routing_words(routing: object | None) -> str:
    if routing is None:
        return "routing as uneven as after long training (docs/planning.md)"
    return "routing as uneven as in the second half of the pilot's runs, which long training evens"


def _gpu() -> str:
    """Name of the GPUs that the runs have used, which this machine need not have."""
    try:
        with Nvml() as nvml:
            name = nvml.card(0).name if nvml.count() else None
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
