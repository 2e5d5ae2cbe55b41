"""The metrics that rules of the routing guard may use, with their meanings from the catalogue."""

from __future__ import annotations

from moepp_megatron.catalogue import METRICS


def _judged(guard: str) -> dict[str, str]:
    return {name: row.with_unit for name, row in METRICS.items() if row.guard == guard}


# Of every MoE layer, in every step, from counts of what its router wants (not what the guard made
# of it).
COUNTED = _judged("counted")
# Of every MoE layer, in steps where router health is measured (observe.health_interval).
MEASURED = _judged("measured")
# Those, and what the guard reads of the whole model.
GUARD_METRICS = {**COUNTED, **MEASURED, **_judged("whole")}
