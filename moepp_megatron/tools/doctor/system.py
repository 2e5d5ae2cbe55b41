"""Checks of the node around the GPUs: shared memory, limits, network ports."""

from __future__ import annotations

import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

from moepp_megatron.config.hardware import Hardware, Thresholds
from moepp_megatron.tools.doctor.finding import Finding, Severity, judged, note, warning


def check_system(hardware: Hardware, num_cards: int) -> list[Finding]:
    """Check shared memory, limits and network ports of a node with this many such GPUs."""
    ports, thresholds = _read_ports(), hardware.thresholds
    return [
        _check_shared_memory(_shared_memory_bytes(), thresholds, num_cards > 0),
        *_check_limits(_Limits.read(), thresholds, bool(ports)),
        *_check_ports(ports, num_cards, hardware.network_gbit_s_per_gpu),
    ]


@dataclass(frozen=True)
class _Limits:
    """Soft limits of this process, in files and bytes; None is unlimited."""

    open_files: int | None
    open_files_hard: int | None  # up to which the process may raise `open_files`
    locked_memory: int | None  # RDMA locks its buffers

    @classmethod
    def read(cls) -> _Limits:
        """Read the limits of this process, which the ranks inherit."""
        files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        return cls(_limit(files), _limit(hard), _limit(locked))


@dataclass(frozen=True)
class _NetworkPort:
    """A port under /sys/class/infiniband (InfiniBand or RoCE)."""

    name: str  # device and port, such as "mlx5_0/1"
    state: str  # such as "ACTIVE", "DOWN", "INIT"
    rate: float | None  # Gbit/s; None if it cannot be read
    link_layer: str  # "InfiniBand" or "Ethernet"


def _read_ports(root: Path = Path("/sys/class/infiniband")) -> list[_NetworkPort]:
    """All RDMA ports; none where there is no such device."""
    ports = []
    for folder in sorted(root.glob("*/ports/*")):
        rate = _read(folder / "rate").split(" ")[0]
        ports.append(
            _NetworkPort(
                f"{folder.parent.parent.name}/{folder.name}",
                _read(folder / "state").rpartition(":")[2].strip() or "unknown",
                float(rate) if rate.replace(".", "", 1).isdigit() else None,
                _read(folder / "link_layer") or "unknown",
            )
        )
    return ports


def _shared_memory_bytes(folder: Path = Path("/dev/shm")) -> int | None:
    """Size of the shared-memory file system; None where there is none."""
    try:
        return shutil.disk_usage(folder).total
    except OSError:
        return None


def _check_shared_memory(size: int | None, thresholds: Thresholds, has_gpu: bool) -> Finding:
    """Check the size of /dev/shm, through which NCCL and data loader workers pass data."""
    size = size or 0
    return judged(
        size >= thresholds.shared_memory_gib * 2**30,
        "shared memory",
        f"/dev/shm has {size / 2**30:.2f} GiB",
        f"must be at least {thresholds.shared_memory_gib:g} GiB",
        "start the container with --ipc=host or --shm-size, or mount a larger tmpfs there",
        # NCCL between processes of one node fails without it; gloo does not use it.
        Severity.ERROR if has_gpu else Severity.WARNING,
    )


def _check_limits(limits: _Limits, thresholds: Thresholds, has_rdma: bool) -> list[Finding]:
    """Check the limits of open files and, with RDMA devices, of locked memory."""
    files, hard, least = limits.open_files, limits.open_files_hard, thresholds.open_files
    can_raise = hard is None or hard >= least
    open_files = judged(
        files is None or files >= least,
        "open files",
        "unlimited" if files is None else str(files),
        f"should be at least {least}",
        f"ulimit -n {least}" if can_raise else "raise LimitNOFILE of slurmd or the container",
        Severity.WARNING,
    )
    locked = limits.locked_memory
    locked_memory = judged(
        locked is None,
        "locked memory",
        "unlimited" if locked is None else f"{locked / 2**20:.0f} MiB",
        "must be unlimited for RDMA",
        "ulimit -l unlimited; under Slurm LimitMEMLOCK=infinity of slurmd, in a container "
        "--ulimit memlock=-1",
        Severity.ERROR,
    )
    return [open_files, locked_memory] if has_rdma else [open_files]


def _check_ports(
    ports: list[_NetworkPort], num_cards: int, rate_per_gpu: float | None
) -> list[Finding]:
    """Check that RDMA ports are up, and fast enough for the GPUs together (Gbit/s per GPU)."""
    if not ports:
        text = "no RDMA device: between nodes NCCL uses TCP"
        return [(note if num_cards else Finding)("network ports", text)]
    # Unplugged Ethernet ports are common and not meant for the job; InfiniBand ports are.
    findings = [
        warning(
            "network ports",
            f"{port.name} is {port.state}",
            "InfiniBand ports should be ACTIVE",
            "check cable and subnet manager (ibstat), or leave it out with NCCL_IB_HCA",
        )
        for port in ports
        if port.state != "ACTIVE" and port.link_layer != "Ethernet"
    ]
    rate = sum(p.rate or 0.0 for p in ports if p.state == "ACTIVE")
    wanted = (rate_per_gpu or 0.0) * num_cards
    observation = f"{len(ports) - len(findings)} of {len(ports)} ports, {rate:g} Gbit/s active"
    if rate < wanted:
        findings.append(
            note(
                "network rate",
                f"{observation}; the vendor's server has {wanted:g} for {num_cards} GPUs",
                remedy="expert parallelism across nodes will be slower than there",
            )
        )
    elif not findings:
        findings.append(Finding("network ports", observation))
    return findings


def _limit(value: int) -> int | None:
    return None if value == resource.RLIM_INFINITY else value


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
