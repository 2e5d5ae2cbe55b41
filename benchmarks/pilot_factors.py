"""What changes the answer of `benchmarks.pilot_large`: its MoE++ arm with one setting changed.

A setting that vanilla has, too, is changed in both. What they are compared with are the pilot's own
runs of its first seeds.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from rich.table import Table

from moepp_megatron.config import with_overrides
from moepp_megatron.workbench.experiments.pilot.arms import PilotArm, build_arms, configured_tau
from moepp_megatron.workbench.experiments.pilot.pooled import PooledLosses
from moepp_megatron.workbench.experiments.pilot.procedure import Pilot
from moepp_megatron.workbench.experiments.pilot.runs import PilotRun
from moepp_megatron.workbench.experiments.pilot.statistics import Estimate
from moepp_megatron.workbench.report.terminal import titled_table

NUM_SEEDS = 2
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
    """The runs of the first seed of all factors, then those of the next."""
    found = [
        pilot.folder.run_of(arm, seed)
        for seed in pilot.seeds[:NUM_SEEDS]
        for factor in factors(pilot)
        for arm in (factor.vanilla, factor.moepp)
    ]
    return list({run.name: run for run in found}.values())


def factors_table(pilot: Pilot) -> Table:
    """MoE++ minus vanilla with and without each change, nats; all finished runs tell the noise."""
    seeds = pilot.seeds[:NUM_SEEDS]
    unchanged = Factor("nothing", pilot.moepp[0], pilot.base[0])
    rows = (unchanged, *factors(pilot))
    losses, shares = {}, {}
    for arm in (arm for factor in rows for arm in (factor.vanilla, factor.moepp)):
        found = [pilot.folder.outcome(pilot.folder.run_of(arm, seed)) for seed in seeds]
        done = [one for one in found if one is not None]
        if len(done) == len(seeds):
            name = arm.arm.name
            losses[name] = {seed: one.valid_loss for seed, one in zip(seeds, done, strict=True)}
            shares[name] = statistics.fmean(one.ffn_share for one in done)
    table = titled_table(f"one factor at a time, {len(seeds)} seeds, nats with 95% intervals")
    for head in ("changed", "FFN share", "MoE++ minus vanilla", "minus unchanged MoE++"):
        table.add_column(head, justify="left" if head == "changed" else "right")
    for factor in rows:
        name = factor.moepp.arm.name
        others = [factor.vanilla.arm.name, unchanged.moepp.arm.name]
        if not losses.keys() >= {name, *others}:
            table.add_row(factor.name, "", "not finished", "")
            continue
        pooled = PooledLosses(losses)
        shown = [
            "" if other == name else _shown(pooled.difference(name, other)) for other in others
        ]
        table.add_row(factor.name, f"{shares[name]:.3f}", *shown)
    return table


def _shown(difference: Estimate) -> str:
    found = difference.interval()
    return f"{found.mean:+.4f} ({found.low:+.3f} to {found.high:+.3f})"
