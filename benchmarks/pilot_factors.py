"""What changes the answer of `benchmarks.pilot_large`: its MoE++ arm with one setting changed.

A setting that vanilla has, too, is changed in both. What they are compared with are the pilot's own
runs. The first seed tells which changes are worth further ones.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from benchmarks.pilot_table import losses_of
from moepp_megatron.config import with_overrides
from moepp_megatron.workbench.experiments.pilot.arms import PilotArm, build_arms, configured_tau
from moepp_megatron.workbench.experiments.pilot.outcome import RunOutcome
from moepp_megatron.workbench.experiments.pilot.pooled import PooledLosses
from moepp_megatron.workbench.experiments.pilot.procedure import Pilot
from moepp_megatron.workbench.experiments.pilot.runs import PilotRun
from moepp_megatron.workbench.experiments.pilot.statistics import Estimate
from moepp_megatron.workbench.report.terminal import titled_table

# Seeds whose differences tell their own noise.
_ENOUGH = 3
_HELD = "moe.budget.target_ffn_per_token=1.3"
# Overrides of MoE++, and those of vanilla where it has the setting.
FACTORS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("moe.balance_coeff=0.01",), ("moe.balance_coeff=0.01",)),
    (("moe.balance_coeff=0.2",), ("moe.balance_coeff=0.2",)),
    (("moe.tau=0.5",), ()),
    (("moe.tau=1",), ()),
    # The share that the unchanged arm comes to, held; then reached on a way from nearly all.
    ((_HELD,), ()),
    ((_HELD, "moe.budget.start_ffn_per_token=1.9", "moe.budget.ramp_steps=500"), ()),
    (("model.init_method_std=0.02",), ("model.init_method_std=0.02",)),
    (("moe.constant_init=zero",), ()),
    (("moe.gating_residual=false",), ()),
    (("moe.gate_normalization=selected",), ("moe.gate_normalization=selected",)),
    (("moe.gate_normalization=nonzero",), ("moe.gate_normalization=selected",)),
    (("moe.expert_input_scale=2",), ()),
)


@dataclass(frozen=True)
class Factor:
    """One change.

    Attributes:
        name: The overrides.
        moepp: The changed arm.
        vanilla: Vanilla to compare with, changed as well where it has the setting.
    """

    name: str
    moepp: PilotArm
    vanilla: PilotArm

    @property
    def arms(self) -> tuple[PilotArm, PilotArm]:
        """MoE++ and vanilla."""
        return self.moepp, self.vanilla


def factors(pilot: Pilot) -> list[Factor]:
    """All of them, with the steps and the validation of the pilot."""
    return [_factor(pilot, moepp, vanilla) for moepp, vanilla in FACTORS]


def _factor(pilot: Pilot, of_moepp: tuple[str, ...], of_vanilla: tuple[str, ...]) -> Factor:
    changed = _arm(pilot, "moepp", of_moepp)
    return Factor(
        _title(of_moepp),
        changed,
        _arm(pilot, "vanilla", of_vanilla) if of_vanilla else pilot.base[0],
    )


def _arm(pilot: Pilot, kind: str, overrides: tuple[str, ...]) -> PilotArm:
    config = with_overrides(pilot.config, list(overrides))
    steps = pilot.base[0].arm.steps
    arms = build_arms(config, steps, [configured_tau(config)], pilot.eval_iters)
    found = next(arm for arm in arms if arm.arm.kind == kind)
    name = {"moepp": "MoE++", "vanilla": "vanilla"}[kind]
    described = found.arm.model_copy(update={"name": f"{name}, {_title(overrides)}"})
    return PilotArm(described, found.config)


def _title(overrides: tuple[str, ...]) -> str:
    return ", ".join(each.split(".", 1)[1] for each in overrides)


def factor_runs(pilot: Pilot) -> list[PilotRun]:
    """The first seed of all factors; then all seeds of what changed most with it, and so on."""
    first, *later = pilot.seeds
    known = factors(pilot)
    unchanged = _unchanged(pilot)
    outcomes = _outcomes(pilot, (unchanged, *known))

    def gain(factor: Factor) -> float:
        moepp, vanilla = (outcomes[arm.arm.name].get(first) for arm in factor.arms)
        return moepp.valid_loss - vanilla.valid_loss if moepp and vanilla else math.nan

    def change(factor: Factor) -> float:
        found = abs(gain(factor) - gain(unchanged))
        return 0.0 if math.isnan(found) else found

    by_change = sorted(known, key=change, reverse=True)
    turns = [(first, factor) for factor in known]
    turns += [(seed, factor) for factor in by_change for seed in later]
    found = [
        pilot.folder.run_of(arm, seed) for seed, factor in turns for arm in reversed(factor.arms)
    ]
    return list({run.name: run for run in found}.values())


def factors_table(pilot: Pilot) -> Table:
    """MoE++ minus vanilla with and without each change, nats, of the seeds that are finished.

    With few seeds an interval is that of the pilot's noise, which a changed model need not have.
    """
    unchanged = _unchanged(pilot)
    rows = (unchanged, *factors(pilot))
    outcomes = _outcomes(pilot, rows)
    noise = _noise(losses_of(pilot, pilot.arms), pilot.seeds)
    table = titled_table("one factor at a time, nats with 95% intervals", narrow=True)
    for head in ("changed", "seeds", "FFN share", "MoE++ minus vanilla", "minus unchanged MoE++"):
        table.add_column(head, justify="left" if head == "changed" else "right")
    for factor in rows:
        compared = (*factor.arms, unchanged.moepp)
        names = dict.fromkeys(arm.arm.name for arm in compared)
        moepp, *others = (outcomes[name] for name in names)
        seeds = [seed for seed in moepp if all(seed in other for other in others)]
        if not seeds:
            table.add_row(factor.name, "", "", "not finished")
            continue
        share = statistics.fmean(moepp[seed].ffn_share for seed in seeds)
        differences = (
            [moepp[seed].valid_loss - other[seed].valid_loss for seed in seeds] for other in others
        )
        shown = [_shown(found, noise) for found in differences]
        table.add_row(factor.name, str(len(seeds)), f"{share:.3f}", *shown)
    return table


def _unchanged(pilot: Pilot) -> Factor:
    return Factor("nothing", pilot.moepp[0], pilot.base[0])


def _outcomes(pilot: Pilot, rows: Sequence[Factor]) -> dict[str, dict[int, RunOutcome]]:
    """Finished runs by arm and seed."""
    found: dict[str, dict[int, RunOutcome]] = {}
    for arm in (arm for factor in rows for arm in factor.arms):
        outcomes = {
            seed: pilot.folder.outcome(pilot.folder.run_of(arm, seed)) for seed in pilot.seeds
        }
        found[arm.arm.name] = {seed: one for seed, one in outcomes.items() if one}
    return found


def _noise(losses: Mapping[str, Mapping[int, float]], seeds: Sequence[int]) -> PooledLosses | None:
    whole = {name: found for name, found in losses.items() if found.keys() == set(seeds)}
    return PooledLosses(whole) if whole else None


def _shown(differences: Sequence[float], noise: PooledLosses | None) -> str:
    """Their mean; its interval by themselves if they are enough, else by the pilot's noise."""
    estimate = Estimate.of(differences)
    if len(differences) < _ENOUGH and noise is not None and noise.noise is not None:
        error = noise.noise * math.sqrt(2 / len(differences))
        estimate = Estimate(estimate.mean, error, noise.degrees)
    found = estimate.interval()
    return f"{found.mean:+.4f} ({found.low:+.3f} to {found.high:+.3f})"
