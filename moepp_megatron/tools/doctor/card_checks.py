"""Checks of one GPU's chip, memory, power and load; None means nothing to say.

Which counters matter, and what they ask for, follows NVIDIA's GPU debug guidelines and GPU memory
error management guide.
"""

from __future__ import annotations

from moepp_megatron.runtime.gpu_state import GPUState
from moepp_megatron.tools.doctor.finding import Judge, Severity, Sign

# NVML's nvmlGpuRecoveryAction_t.
_RECOVERY = {
    1: "a GPU reset",
    2: "a reboot of the node",
    3: "draining peer-to-peer traffic and a reset",
    4: "draining the node and a reset",
    5: "recovery of the IMEX domain",
    6: "a bus reset",
    7: "a reboot of the system",
}

# NVML's nvmlClocksEventReason bits. Idle (0x1) and the ordinary power limit under load (0x4), which
# every GPU at full load reports, are no findings.
_HARDWARE_SLOWDOWN = {
    0x08: "hardware slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake from the power supply",
}
_SOFTWARE_SLOWDOWN = {
    0x02: "clocks set by hand",
    0x20: "software thermal slowdown",
    0x200: "board limit",
    0x400: "reliability limit",
}


def faults(card: GPUState, judge: Judge) -> Sign | None:
    """Failed queries, by which NVML shows a GPU that has fallen off the bus or had an Xid."""
    if not card.faults:
        return None
    return (
        Severity.ERROR,
        ", ".join(card.faults),
        "every query must be answered",
        "look for NVRM Xid lines in dmesg, drain the node, reset the GPU or reboot",
    )


def recovery(card: GPUState, judge: Judge) -> Sign | None:
    """The recovery that the driver asks for after a fault."""
    if not card.recovery_action:
        return None
    action = _RECOVERY.get(card.recovery_action, f"action {card.recovery_action}")
    return (
        Severity.ERROR,
        f"the driver asks for {action}",
        "no recovery may be pending",
        "do what it asks for before the next job; dmesg names the Xid",
    )


def ecc_errors(card: GPUState, judge: Judge) -> Sign | None:
    """Finds uncorrectable errors since the driver was loaded, and ECC that is switched off."""
    if card.ecc_uncorrected:
        return (
            Severity.ERROR,
            f"{card.ecc_uncorrected} uncorrectable since the driver was loaded",
            "must be 0: memory may be wrong",
            "drain the node and reset the GPU; if they come back, run dcgmi diag -r 3 and return "
            "the GPU",
        )
    if card.ecc_enabled is False:
        return (
            Severity.WARNING,
            "ECC is off",
            "bit flips go unnoticed",
            "nvidia-smi -e 1, then reset the GPU",
        )
    return None


def memory_rows(card: GPUState, judge: Judge) -> Sign | None:
    """Remapped rows (Ampere and newer) and retired pages (before)."""
    rows = card.rows
    if rows is not None and rows.failed:
        return (
            Severity.ERROR,
            "a row could not be remapped",
            "spare rows must be left",
            "return the GPU",
        )
    if (rows is not None and rows.pending) or card.retirement_pending:
        what = "a remapped row" if rows is not None and rows.pending else "a retired page"
        return (
            Severity.ERROR,
            f"{what} waits for a reset",
            "broken memory is still in use until then",
            "reset the GPU (nvidia-smi -r) or reboot the node",
        )
    if rows is not None and rows.uncorrectable:
        return (
            Severity.NOTE,
            f"{rows.uncorrectable} rows remapped after uncorrectable errors",
            "",
            "works; watch whether the number grows",
        )
    if card.retired_pages:
        return (
            Severity.NOTE,
            f"{card.retired_pages} retired pages",
            "",
            "works; the GPU is returned at 60 pages",
        )
    return None


def throttling(card: GPUState, judge: Judge) -> Sign | None:
    """Why clocks are reduced, apart from load and idleness."""
    reasons = card.throttle_reasons or 0
    hard = [name for bit, name in _HARDWARE_SLOWDOWN.items() if reasons & bit]
    if hard:
        return (
            Severity.ERROR,
            ", ".join(hard),
            "the hardware must not slow the GPU down",
            "check cooling, power supplies and cables of the node (nvidia-smi -q -d PERFORMANCE)",
        )
    soft = [name for bit, name in _SOFTWARE_SLOWDOWN.items() if reasons & bit]
    if soft:
        return (
            Severity.WARNING,
            ", ".join(soft),
            "one slow GPU slows all ranks",
            "nvidia-smi -rgc and -rac lift clocks set by hand; else check cooling",
        )
    return None


def clocks(card: GPUState, judge: Judge) -> Sign | None:
    """Checks the clock under load; an idle GPU, whose clock is low to save power, is not judged."""
    if not is_loaded(card) or card.sm_clock is None or not card.max_sm_clock:
        return None
    if throttling(card, judge) is not None:
        # The cause is named already.
        return None
    share = card.sm_clock / card.max_sm_clock
    # Under the power limit a large matrix product runs at 0.65 to 0.9 of the highest clock.
    if share >= 0.5:
        return None
    return (
        judge.unfit_now,
        f"{card.sm_clock} MHz under load",
        f"should be at least half of {card.max_sm_clock} MHz",
        "look at GPU throttling and GPU power cap; nvidia-smi -rgc lifts a clock set by hand",
    )


def is_loaded(card: GPUState) -> bool:
    """True if the GPU was computing when it was read: in P0 and not marked idle."""
    idle = card.throttle_reasons is not None and bool(card.throttle_reasons & 0x1)
    return bool(card.busy_power_state) and card.throttle_reasons is not None and not idle


def power_cap(card: GPUState, judge: Judge) -> Sign | None:
    """Finds a power limit below the GPU's rated power."""
    rated_watts = judge.hardware.power_watts if judge.hardware is not None else None
    rated_watts = rated_watts or card.default_power_limit
    if card.power_limit is None or rated_watts is None:
        return None
    if card.power_limit >= rated_watts * judge.thresholds.power_limit_fraction:
        return None
    return (
        Severity.WARNING,
        f"capped at {card.power_limit:.0f} W",
        f"rated {rated_watts:.0f} W",
        f"nvidia-smi -i {card.index} -pl {rated_watts:.0f}, unless the cap is meant",
    )


def temperature(card: GPUState, judge: Judge) -> Sign | None:
    """Finds a GPU near the temperature at which it slows down."""
    if card.temperature is None or card.slowdown_temperature is None:
        return None
    margin = card.slowdown_temperature - card.temperature
    if margin > judge.thresholds.temperature_margin_c:
        return None
    return (
        Severity.ERROR if margin <= 0 else Severity.WARNING,
        f"{card.temperature} C",
        f"slows down at {card.slowdown_temperature} C",
        "check fans, coolant and inlet temperature of the node",
    )


def processes(card: GPUState, judge: Judge) -> Sign | None:
    """Finds other users' processes on the GPU."""
    foreign = [process for process in card.processes if process.pid not in judge.own_pids]
    # Where NVML hides a process's memory, being there is all that is known: it counts.
    limit = judge.thresholds.foreign_memory_gib * 2**30
    memory = sum(process.memory or 0 for process in foreign)
    hidden = any(process.memory is None for process in foreign)
    if not foreign or (memory < limit and not hidden):
        return None
    pids = ", ".join(str(process.pid) for process in foreign)
    size = "an unknown amount" if hidden else f"{memory / 2**30:.1f} GiB"
    return (
        judge.unfit_now,
        f"processes {pids} hold {size}",
        f"others may hold at most {judge.thresholds.foreign_memory_gib:g} GiB",
        "end them if they are left over from an earlier job, or use another node",
    )
