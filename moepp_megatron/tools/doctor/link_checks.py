"""Checks of one GPU's links: PCIe and NVLink; None means nothing to say."""

from __future__ import annotations

from moepp_megatron.runtime.gpu_state import GPUState
from moepp_megatron.tools.doctor.card_checks import is_loaded
from moepp_megatron.tools.doctor.finding import Judge, Severity, Sign

_RESEAT = "reseat GPU or riser, check BIOS settings of the slot; nvidia-smi -q -d PCIE"


def pcie(card: GPUState, judge: Judge) -> Sign | None:
    """Check width and generation of the link; the present generation only under load.

    An idle GPU lowers its generation to save power, so that only the generation that GPU and slot
    support is judged then.
    """
    hardware = judge.hardware
    if hardware is None:
        return None
    if _below(card.pcie_width, hardware.pcie_width):
        observation, rule = f"x{card.pcie_width}", f"must be x{hardware.pcie_width}"
    elif _below(card.pcie_max_generation, hardware.pcie_generation):
        observation = f"generation {card.pcie_max_generation} at most"
        rule = f"must be generation {hardware.pcie_generation}"
    elif is_loaded(card) and _below(card.pcie_generation, hardware.pcie_generation):
        observation = f"generation {card.pcie_generation} under load"
        rule = f"must be generation {hardware.pcie_generation}"
    else:
        return None
    return judge.unfit_now, observation, rule, _RESEAT


def nvlink_state(card: GPUState, judge: Judge) -> Sign | None:
    """Finds links that are down, or fewer links than this kind of GPU has."""
    down = [str(link.index) for link in card.links if not link.active]
    if down:
        return (
            Severity.ERROR,
            f"links {', '.join(down)} are down",
            f"all {len(card.links)} links must be up",
            "restart nvidia-fabricmanager; if it stays, reset all GPUs or return the node",
        )
    expected = judge.hardware.nvlink_links if judge.hardware is not None else 0
    if 0 < len(card.links) < expected:
        return (
            Severity.ERROR,
            f"{len(card.links)} links",
            f"must have {expected}",
            "restart nvidia-fabricmanager; if it stays, reset all GPUs or return the node",
        )
    return None


def nvlink_errors(card: GPUState, judge: Judge) -> Sign | None:
    """Finds errors of active links: recoveries stop traffic, replays and CRC errors slow it."""
    recoveries = sum(link.recoveries or 0 for link in card.links)
    repeats = sum((link.replays or 0) + (link.crc_errors or 0) for link in card.links)
    if not recoveries and not repeats:
        return None
    bad = [
        str(link.index) for link in card.links if link.recoveries or link.replays or link.crc_errors
    ]
    return (
        Severity.WARNING if recoveries else Severity.NOTE,
        f"links {', '.join(bad)}: {recoveries} recoveries, "
        f"{repeats} replays and CRC errors since the driver was loaded",
        "recoveries should be 0" if recoveries else "",
        "reset the GPU to clear the counters; if they grow again, return the node"
        if recoveries
        else "few are harmless; watch whether they grow",
    )


def _below(value: int | None, rated: int | None) -> bool:
    return value is not None and rated is not None and value < rated
