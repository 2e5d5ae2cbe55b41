"""A profile as JSON: what `moepp profile --json` writes.

Times are milliseconds, a step's and a rank's mean unless a name says otherwise, sizes bytes.
"""

from typing import Any

from moepp_megatron.tools.profiling.analysis import Profile
from moepp_megatron.tools.profiling.measures.classes import CallClass

_FORMAT = 1


def document(profile: Profile) -> dict[str, Any]:
    """All results, for `json.dumps`."""
    about, load = profile.about, profile.load
    return {
        "format": _FORMAT,
        "name": profile.name,
        "backend": profile.traces[0].backend,
        "device": about.device or ("gpu" if profile.traces[0].on_gpu else "cpu"),
        "world_size": profile.world_size,
        "ranks": profile.ranks,
        "nodes": about.nodes,
        "layout": about.layout,
        "dispatcher": about.dispatcher,
        "steps": profile.steps,
        "step_ms": profile.step_us / 1e3,
        "exposed_share": profile.exposed_share,
        "critical_rank": profile.critical_rank,
        "others_waited_ms": {
            str(rank): us / 1e3 / len(profile.steps) for rank, us in profile.caused_us.items()
        },
        "rank_steps": _rank_steps(profile),
        "expert_load": load
        and {"busiest_rank": load.busiest, "busiest_over_mean": load.busiest_over_mean},
        "collectives": [_class(row, len(profile.rank_steps)) for row in profile.classes],
        "all_to_all": _layers(profile),
        "all_to_all_equals_formula": profile.equals_formula,
    }


def _rank_steps(profile: Profile) -> list[dict[str, Any]]:
    rows = profile.load.rows if profile.load is not None else {}
    parts = ("step", "compute", "communication", "exposed")
    return [
        {
            "step": step,
            "rank": rank,
            **{f"{part}_ms": getattr(time, f"{part}_us") / 1e3 for part in parts},
            "exposed_share": time.exposed_share,
            "expert_rows": rows.get((step, rank)),
        }
        for step, ranks in profile.times.items()
        for rank, time in ranks.items()
    ]


def _class(row: CallClass, count: int) -> dict[str, Any]:
    rates = ("bus_gb_s", "peak_gb_s", "peak_share")
    return {
        "purpose": row.name.purpose,
        "operation": row.name.operation.value,
        "group": row.name.group,
        "pass": row.name.phase,
        "group_size": row.group_size,
        "link": row.link,
        "calls": row.calls / count,
        "bytes": row.size / count,
        "bytes_per_call": row.size / row.calls,
        "time_ms": row.time_us / 1e3 / count,
        "wait_ms": row.wait_us / 1e3 / count if row.matched else None,
        "transfer_ms": row.transfer_us / 1e3 / count if row.matched else None,
        "exposed_ms": row.exposed_us / 1e3 / count,
        **{rate: getattr(row, rate) for rate in rates},
    }


def _layers(profile: Profile) -> list[dict[str, Any]]:
    sizes = ("measured", "expected", "ffn_only", "deduplicated", "vanilla", "side")
    return [
        {
            "step": step,
            "layer": row.place.layer,
            "direction": row.place.part,
            "pass": row.place.phase,
            "equal": row.is_equal,
            **{f"{size}_bytes": getattr(row, size) for size in sizes},
        }
        for step in profile.steps
        for row in profile.layers[step]
    ]
