"""The state of `benchmarks.pilot_large`: losses, and differences of arms as long as some miss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moepp_megatron.workbench.experiments.pilot.arms import PilotArm
from moepp_megatron.workbench.experiments.pilot.collect import result_of
from moepp_megatron.workbench.experiments.pilot.pooled import PooledLosses
from moepp_megatron.workbench.experiments.pilot.procedure import Pilot
from moepp_megatron.workbench.experiments.pilot.report import print_pilot
from moepp_megatron.workbench.report.terminal import titled_table, wide_console


def print_state(pilot: Pilot, arms: Sequence[PilotArm]) -> None:
    """Print losses by arm and seed, then the verdict or what can be said before it."""
    losses = losses_of(pilot, arms)
    table = titled_table("validation loss", narrow=True)
    for name in ("arm", *map(str, pilot.seeds)):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for name, found in losses.items():
        cells = (f"{found[seed]:.4f}" if seed in found else "" for seed in pilot.seeds)
        table.add_row(name, *cells)
    console = wide_console()
    console.print(table)
    result = result_of(pilot)
    if result is not None:
        print_pilot(result)
        return
    for line in differences(losses, arms):
        console.print(line, soft_wrap=True)
    console.print(
        f"no verdict yet: it needs {pilot.plan.first} seeds of every arm and the sessions of --time"
    )


def losses_of(pilot: Pilot, arms: Sequence[PilotArm]) -> dict[str, dict[int, float]]:
    """Validation losses of finished runs by arm and seed."""
    found: dict[str, dict[int, float]] = {}
    for arm in arms:
        outcomes = {
            seed: pilot.folder.outcome(pilot.folder.run_of(arm, seed)) for seed in pilot.seeds
        }
        found[arm.arm.name] = {seed: one.valid_loss for seed, one in outcomes.items() if one}
    return found


def differences(losses: dict[str, dict[int, float]], arms: Sequence[PilotArm]) -> Iterator[str]:
    """Lines about arms that share two seeds or more with vanilla, of the seeds that all have."""
    begun = {name: found for name, found in losses.items() if len(found) > 1}
    shared = set.intersection(*map(set, begun.values())) if begun else set()
    if len(begun) < 2 or len(shared) < 2:
        return
    pooled = PooledLosses(
        {name: {seed: found[seed] for seed in shared} for name, found in begun.items()}
    )
    vanilla = arms[0].arm.name
    pairs = [(arm.arm.name, vanilla) for arm in arms[1:]]
    pairs += [(arm.arm.matches, arm.arm.name) for arm in arms if arm.arm.kind == "narrow"]
    for one, other in pairs:
        if one in begun and other in begun:
            found = pooled.difference(one, other).interval()
            yield (
                f"{one} minus {other}: {found.mean:+.4f} nats, 95% {found.low:+.4f} to "
                f"{found.high:+.4f}, {len(shared)} seeds"
            )
