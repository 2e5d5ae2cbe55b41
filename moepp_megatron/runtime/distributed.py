"""Creates process groups: the default group and Megatron's rank grid."""

import contextlib
import faulthandler
import itertools
import math
import os
import random
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moepp_megatron.config import Config, Layout
from moepp_megatron.config.errors import ConfigError, UnfitError
from moepp_megatron.runtime import cpu_support
from moepp_megatron.runtime.launch import has_launcher, write_status
from moepp_megatron.runtime.rank import RankEnvironment

# A rank may wait this long for another one's disk.
_TIMEOUT = timedelta(hours=1)


def gathered(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's `value`, by rank; a collective of the group, by default of all ranks."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


class Agreement:
    """Messages between the CPUs of all ranks; each must make every call, in the same order.

    Not over NCCL: a check whether all ranks have finished writing must not wait for the GPU.
    """

    def __init__(self) -> None:
        self._group: Any = None
        if dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)

    def all(self, value: bool) -> bool:
        """True if `value` is true on every rank."""
        flag = torch.tensor([int(value)], device="cpu")
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self._group)
        return bool(flag.item())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, by rank."""
        return gathered(value, self._group)

    def from_first(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def first_reason(self, reason: str | None) -> str | None:
        """The first rank's reason against something, named by its rank; None if none has one."""
        for rank, theirs in enumerate(self.gather(reason)):
            if theirs is not None:
                return theirs if dist.get_world_size() == 1 else f"rank {rank}: {theirs}"
        return None


# A check that ranks make before they compute, from the store, their rank and world size.
RankCheck = Callable[[dist.Store, int, int], None]
# One a process, since one rank serves it to the others, who may be slower to leave a group.
_STORES: dict[RankEnvironment, dist.Store] = {}
# Ranks run the same program, so all count alike.
_STARTS = itertools.count()


def start(
    environment: RankEnvironment,
    timeout: timedelta = timedelta(minutes=10),
    check: RankCheck | None = None,
) -> torch.device:
    """Choose the device, set threads, join the default process group (NCCL, or gloo on CPUs).

    `check` is called with the store where several ranks meet, before they have a group.
    Returns this rank's device. A collective that a rank never joins raises after `timeout`.
    UnfitError if this node has more ranks than GPUs.
    """
    # Else a mapped file that is truncated (SIGBUS) ends the rank silently. Without a stderr
    # that is a file there is nowhere to say it.
    with contextlib.suppress(OSError, RuntimeError, ValueError, AttributeError):
        if not faulthandler.is_enabled():
            faulthandler.enable()
    on_cpu = cpu_support.install()
    if environment.world_size > 1 and environment.rank == 0 and not has_launcher():
        limit = f"{timeout.total_seconds():.0f} s at most"
        print(f"waiting for {environment.world_size} ranks, {limit}", file=sys.stderr)
    store = None if dist.is_initialized() else _rendezvous_store(environment, timeout)
    if check is not None and store is not None and environment.world_size > 1:
        check(store, environment.rank, environment.world_size)
    if not os.environ.get("OMP_NUM_THREADS") or (on_cpu and environment.world_size == 1):
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // environment.local_world_size))
    device = torch.device("cpu") if on_cpu else _gpu_of_rank(environment, store)
    if not on_cpu:
        torch.cuda.set_device(device)
    if store is not None:
        # Without `device_id`: with it NCCL makes the communicators of all groups
        # at once, even of those that nothing uses; their memory and time have not been measured.
        dist.init_process_group(
            "gloo" if on_cpu else "nccl",
            store=store,
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=timeout,
        )
    return device


def collective_timeout(config: Config) -> timedelta:
    """The timeout of collectives: longer than the watchdog's, which reports the missing rank."""
    resilience = config.resilience
    if resilience.hang_timeout_s == 0:
        return timedelta(minutes=10)
    # A minute for the watchdog's own work on a slow file system.
    return timedelta(seconds=resilience.hang_slow_phase_timeout_s, minutes=1)


def build_groups(config: Config, layout: Layout) -> None:
    """Create Megatron's process groups and seed its random streams by `training.seed`.

    The layout must match the default process group's size.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if config.training.deterministic:
        # Before the first group: NCCL and cuBLAS read these when they start.
        _require_determinism()
    world_size = dist.get_world_size()
    assert layout.world_size == world_size, f"layout of {layout.world_size}, {world_size} ranks"
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=math.ceil(collective_timeout(config).total_seconds() / 60),
        # A gloo twin of each data-parallel group serves only checkpoint formats that are not used
        # here; without them a rank starts faster and has fewer threads.
        create_gloo_process_groups=False,
        # Streams are NCCL's; gloo has no priorities, and torch for CPUs no NCCL.
        high_priority_stream_groups=(
            list(config.parallel.high_priority_stream_groups)
            if dist.get_backend() == "nccl"
            else None
        ),
    )
    # Libraries draw from these too, so a run is repeatable only if all of them are seeded.
    random.seed(config.training.seed)
    np.random.seed(config.training.seed)
    torch.manual_seed(config.training.seed)
    # A graph draws random numbers from generators that it knows, not from copied states, and
    # Transformer Engine's attention takes no tracker but its own into a graph.
    graphs = bool(config.training.cuda_graphs)
    model_parallel_cuda_manual_seed(
        config.training.seed, te_rng_tracker=graphs, use_cudagraphable_rng=graphs
    )


def _require_determinism() -> None:
    """Select deterministic kernels, except where the environment sets them."""
    torch.use_deterministic_algorithms(True)
    # A fixed workspace (cuBLAS), a fixed order of reduction (NCCL), no atomics in attention
    # (Transformer Engine); megatron-core's `deterministic_mode` asks for the same.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")


def stop() -> None:
    """Destroy every process group of this process."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def initialized(
    environment: RankEnvironment,
    timeout: timedelta = timedelta(minutes=10),
    check: RankCheck | None = None,
) -> Iterator[torch.device]:
    """Make this process a rank in the block; arguments and value are those of `start`.

    Groups are destroyed at the end and after an error of the user, which every rank meets: Python
    may abort at its end if threads of a group are left, and the exit code would be lost. After
    any other error they are kept, because other ranks may be in the middle of a collective.
    """
    device = start(environment, timeout, check)
    try:
        yield device
    except (ConfigError, UnfitError) as error:
        # Before the groups are gone: ranks that lose their peer see that it has refused.
        write_status(error.exit_code, str(error))
        stop()
        raise
    stop()
    # The launcher then does not take the end of this rank for a failure elsewhere.
    write_status(0)


def _rendezvous_store(environment: RankEnvironment, timeout: timedelta) -> dist.Store:
    """The store through which ranks find each other."""
    if environment.world_size == 1:
        # A lone process needs no address to meet others at.
        return dist.HashStore()
    if environment not in _STORES:
        _STORES[environment] = _open_store(environment, timeout)
    # It still holds the addresses of a group that this program has joined before and left.
    return dist.PrefixStore(f"join_{next(_STARTS)}", _STORES[environment])


def _open_store(environment: RankEnvironment, timeout: timedelta) -> dist.Store:
    if environment.meets_at is not None:
        host, port, serves = environment.meets_at
        try:
            socket.getaddrinfo(host, port)
        except OSError as error:
            # The store would try silently until `timeout`.
            raise UnfitError(
                f"the first machine ({host}) must have an address here ({error.strerror}); export "
                "MASTER_ADDR=ADDRESS, which all machines reach"
            ) from None
        return dist.TCPStore(host, port, environment.world_size, is_master=serves, timeout=timeout)
    store, _, _ = next(
        dist.rendezvous("env://", environment.rank, environment.world_size, timeout=timeout)
    )
    # After a restart torchrun hands out the same store, with the addresses of dead ranks in it. It
    # does so on a single machine only: several count their restarts differently.
    return dist.PrefixStore(f"attempt_{environment.restart_count}", store)


_SYSTEM = Path("/sys")


def _gpu_of_rank(environment: RankEnvironment, store: dist.Store | None) -> torch.device:
    """The GPU of this rank: of those of the node the one of its number, or the first of its own.

    A scheduler may show each rank only its own GPUs (`srun --gpus-per-task=1`). All of them are
    then number 0, so ranks of a node that see fewer GPUs than they are exchange which they have,
    through `store`; it is None where they have met already, and each has chosen. UnfitError, on
    every rank of the node, if there are more ranks than GPUs.
    """
    if environment.local_world_size <= torch.cuda.device_count():
        return torch.device("cuda", environment.local_rank)
    if store is None:
        return torch.device("cuda", torch.cuda.current_device())
    node = f"gpu of {socket.gethostname()}"
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    store.set(f"{node} {environment.local_rank}", uuid)
    ranks = range(environment.local_world_size)
    gpus = {store.get(f"{node} {rank}") for rank in ranks}
    if len(gpus) < len(ranks):
        here = max(len(gpus), torch.cuda.device_count())
        raise UnfitError(
            f"ranks of {socket.gethostname()} ({len(ranks)}) must be at most its GPUs ({here}), "
            f"since NCCL takes one rank a GPU; start {here} there, or show every rank a GPU of its "
            "own"
        )
    return torch.device("cuda", 0)


def bind_to_gpu(device: torch.device) -> None:
    """Let this thread, and those that it starts, run only on cores of its GPU's NUMA node.

    Cores that this process may not use are left out. Does nothing on a CPU, and if the system does
    not say which cores are near. The rank does it, not torchrun or srun: so it holds however the
    rank was started, and needs no `numactl`.
    """
    if device.type != "cuda":
        return
    # torch's stub file does not know these fields.
    gpu: Any = torch.cuda.get_device_properties(device)
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    near = _cores_near(address) & os.sched_getaffinity(0)
    if near:
        os.sched_setaffinity(0, near)


def _cores_near(address: str, system: Path = _SYSTEM) -> set[int]:
    """The cores of the NUMA node of a PCI device such as 0000:1b:00.0; empty if not known."""
    try:
        node = int((system / "bus/pci/devices" / address / "numa_node").read_text())
        # A machine with one node says -1: every core is as near as any other.
        cores = system / f"devices/system/node/node{node}/cpulist"
        return set() if node < 0 else _numbers(cores.read_text())
    except (OSError, ValueError):
        return set()


def _numbers(text: str) -> set[int]:
    """The numbers of a list such as `0-3,8,10-11`."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers
