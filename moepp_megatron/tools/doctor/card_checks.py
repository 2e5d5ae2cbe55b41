"""Checks of each GPU: chip, memory, power, load and links.

Counters and remedies follow NVIDIA's GPU debug guidelines and GPU memory error management guide.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from moepp_megatron.runtime.gpu_state import GPUState
from moepp_megatron.tools.doctor.finding import Finding, Judge, Severity

# Severity, observation, rule and remedy, as in `Finding`; None where a GPU is healthy.
_Sign = tuple[Severity, str, str, str] | None
_Healthy = Callable[[Sequence[GPUState]], str]

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
_RESTART = "restart nvidia-fabricmanager; if it stays, reset all GPUs or return the node"
_RESEAT = "reseat GPU or riser, check BIOS settings of the slot; nvidia-smi -q -d PCIE"


def _faults(card: GPUState, judge: Judge) -> _Sign:
    """Failed queries, by which NVML shows a GPU that has fallen off the bus or had an Xid."""
    if not card.faults:
        return None
    return (
        Severity.ERROR,
        ", ".join(card.faults),
        "every query must be answered",
        "look for NVRM Xid lines in dmesg, drain the node, reset the GPU or reboot",
    )


def _recovery(card: GPUState, judge: Judge) -> _Sign:
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


def _ecc_errors(card: GPUState, judge: Judge) -> _Sign:
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


def _memory_rows(card: GPUState, judge: Judge) -> _Sign:
    """Rows of memory that could not be replaced by spare ones, or not yet."""
    if card.rows is not None and card.rows.failed:
        return (
            Severity.ERROR,
            "a row could not be remapped",
            "spare rows must be left",
            "return the GPU",
        )
    if card.rows is not None and card.rows.pending:
        return (
            Severity.ERROR,
            "a remapped row waits for a reset",
            "broken memory is still in use until then",
            "reset the GPU (nvidia-smi -r) or reboot the node",
        )
    return None


def _throttling(card: GPUState, judge: Judge) -> _Sign:
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


def _is_loaded(card: GPUState) -> bool:
    """True if the GPU was computing when it was read: in P0 and not marked idle."""
    reasons = card.throttle_reasons
    return bool(card.busy_power_state) and reasons is not None and not reasons & 0x1


def _power_cap(card: GPUState, judge: Judge) -> _Sign:
    """Finds a power limit below the GPU's rated power."""
    rated_watts = judge.hardware.power_watts or card.default_power_limit
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


def _processes(card: GPUState, judge: Judge) -> _Sign:
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


def _pcie(card: GPUState, judge: Judge) -> _Sign:
    """Check width and generation of the link; an idle GPU lowers its generation to save power."""
    hardware = judge.hardware
    if _below(card.pcie_width, hardware.pcie_width):
        observation, rule = f"x{card.pcie_width}", f"must be x{hardware.pcie_width}"
    elif _below(card.pcie_max_generation, hardware.pcie_generation):
        observation = f"generation {card.pcie_max_generation} at most"
        rule = f"must be generation {hardware.pcie_generation}"
    elif _is_loaded(card) and _below(card.pcie_generation, hardware.pcie_generation):
        observation = f"generation {card.pcie_generation} under load"
        rule = f"must be generation {hardware.pcie_generation}"
    else:
        return None
    return judge.unfit_now, observation, rule, _RESEAT


def _nvlink_state(card: GPUState, judge: Judge) -> _Sign:
    """Finds links that are down, or fewer links than this kind of GPU has."""
    down = [str(link.index) for link in card.links if not link.active]
    if down:
        return (
            Severity.ERROR,
            f"links {', '.join(down)} are down",
            f"all {len(card.links)} links must be up",
            _RESTART,
        )
    expected = judge.hardware.nvlink_links
    if 0 < len(card.links) < expected:
        return (
            Severity.ERROR,
            f"{len(card.links)} links",
            f"must have {expected}",
            _RESTART,
        )
    return None


def _nvlink_errors(card: GPUState, judge: Judge) -> _Sign:
    """Links that had to recover, which stops their traffic."""
    bad = [f"{link.index} ({link.recoveries})" for link in card.links if link.recoveries]
    if not bad:
        return None
    return (
        Severity.WARNING,
        f"recoveries of links {', '.join(bad)} since the driver was loaded",
        "should be 0",
        "reset the GPU to clear the counters; if they grow again, return the node",
    )


def _below(value: int | None, rated: int | None) -> bool:
    return value is not None and rated is not None and value < rated


def _listed(show: Callable[[GPUState], str | None], absent: str = "not reported") -> _Healthy:
    """List what differs between the GPUs; `absent` where no GPU has it."""
    return lambda cards: ", ".join(sorted(set(filter(None, map(show, cards))))) or absent


def _power_limit(card: GPUState) -> str | None:
    return None if card.power_limit is None else f"{card.power_limit:.0f} W"


def _pcie_link(card: GPUState) -> str | None:
    return f"generation {card.pcie_max_generation} x{card.pcie_width}" if card.pcie_width else None


def _links_up(card: GPUState) -> str | None:
    return f"{len(card.links)} links up" if card.links else None


def _ecc_state(cards: Sequence[GPUState]) -> str:
    return "not reported" if any(card.ecc_enabled is None for card in cards) else "none"


class _CardCheck(NamedTuple):
    """A check of one GPU, and what to say of GPUs that pass it."""

    run: Callable[[GPUState, Judge], _Sign]
    healthy: _Healthy = lambda cards: "none"


# In the order of the table.
_CARD_CHECKS = {
    "GPU faults": _CardCheck(_faults),
    "GPU recovery": _CardCheck(_recovery),
    "ECC errors": _CardCheck(_ecc_errors, _ecc_state),
    "GPU memory rows": _CardCheck(_memory_rows),
    "GPU throttling": _CardCheck(_throttling),
    "GPU power cap": _CardCheck(_power_cap, _listed(_power_limit)),
    "GPU processes": _CardCheck(_processes),
    "PCIe": _CardCheck(_pcie, _listed(_pcie_link)),
    "NVLink": _CardCheck(_nvlink_state, _listed(_links_up, "no NVLink")),
    "NVLink errors": _CardCheck(_nvlink_errors),
}


def check_cards(cards: Sequence[GPUState], judge: Judge) -> list[Finding]:
    """Run every check on all GPUs: one finding per sick GPU, or one per check without any."""
    findings: list[Finding] = []
    for name, check in _CARD_CHECKS.items():
        findings += signs(cards, judge, name) or [Finding(name, check.healthy(cards))]
    return findings


def signs(cards: Sequence[GPUState], judge: Judge, name: str) -> list[Finding]:
    """Run the check of this name on the GPUs; empty where all are healthy."""
    found = ((card, _CARD_CHECKS[name].run(card, judge)) for card in cards)
    return [
        Finding(name, f"GPU {card.index}: {sign[1]}", *sign[2:], sign[0])
        for card, sign in found
        if sign is not None
    ]
