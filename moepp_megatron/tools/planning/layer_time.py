"""Time of one layer and micro-batch on the slowest rank: parts, communication, overlap."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from moepp_megatron.tools.planning.grid import Grid
from moepp_megatron.tools.planning.machine import Machine
from moepp_megatron.tools.planning.parts import (
    TRAVELLING,
    Layer,
    LayerPart,
    embedding_part,
    layer_parts,
    output_part,
)
from moepp_megatron.tools.planning.rates import Work
from moepp_megatron.tools.planning.traffic import layer_traffic
from moepp_megatron.tools.planning.workload import Workload

# Names besides those of parts.py, in the order of plots.
RECOMPUTE, TENSOR, CONTEXT = "recomputation", "tensor parallel", "context parallel"
EXCHANGE, METADATA = "expert exchange", "sizes of the exchange"
HOST = "waiting for the host"


@dataclass(frozen=True)
class PassTime:
    """Seconds by name; forward and backward of one micro-batch."""

    forward: float = 0.0  # total of the forward pass
    backward: float = 0.0  # total of the backward pass
    seconds: Mapping[str, float] = field(default_factory=dict)  # both together, by name
    # Communication that runs during computation, by name; not in `seconds`.
    hidden: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Forward and backward, seconds."""
        return self.forward + self.backward


def sum_passes(parts: Sequence[tuple[PassTime, float]]) -> PassTime:
    """Passes through this many layers of each kind."""
    seconds: dict[str, float] = defaultdict(float)
    hidden: dict[str, float] = defaultdict(float)
    for time, count in parts:
        for total, values in ((seconds, time.seconds), (hidden, time.hidden)):
            for name, value in values.items():
                total[name] += count * value
    forward = sum(count * time.forward for time, count in parts)
    backward = sum(count * time.backward for time, count in parts)
    return PassTime(forward, backward, dict(seconds), dict(hidden))


@lru_cache(maxsize=100_000)
def layer_time(
    load: Workload, grid: Grid, machine: Machine, is_moe: bool, rows: float, skew: float
) -> PassTime:
    """Time of a layer; `grid` need not be whole, see `Grid.layer_key`."""
    parts = list(layer_parts(load, grid, Layer(is_moe, rows, has_residual=True)))
    traffic = layer_traffic(load, grid, machine, is_moe, skew)
    overlaps = grid.expert_overlap and traffic.experts > 0
    reads_sizes = is_moe and load.experts.static_rows is None
    slower = 1.0 / (1.0 - machine.reached.overlap_slowdown) if overlaps else 1.0
    clock = _LayerClock(machine, slower, load.graphs)
    for part in parts:
        clock.add(part)
    clock.communicate(TENSOR, traffic.tensor_forward, traffic.tensor_backward)
    if grid.recomputes_all:
        clock.communicate(TENSOR, 0.0, traffic.tensor_forward)
    # Keys and values travel while the core works on those that have arrived.
    core = next(part for part in parts if part.name == "attention")
    ahead = traffic.context - core.forward.core_seconds(machine)
    back = 2 * traffic.context - core.backward.core_seconds(machine)
    clock.communicate(CONTEXT, max(ahead, 0.0), max(back, 0.0))
    if traffic.experts:
        repeats = 2 if grid.recomputes_all or "moe" in grid.recompute else 1
        reached = machine.reached
        share = reached.overlap if load.experts.dispatcher == "flex" else reached.plain_overlap
        clock.exchange(traffic.experts, repeats * traffic.experts, share if overlaps else 0.0)
        local = [part for part in parts if part.name in ("shared_expert", "zero_computation")]
        overlapped = [
            _seconds_during_rows(load, grid, machine, works, traffic.experts)
            for works in ([p.forward for p in local], [p.backward for p in local])
        ]
        clock.hide(EXCHANGE, overlapped[0], overlapped[1] + (repeats - 1) * overlapped[0])
        if load.experts.dispatcher != "allgather":
            clock.wait_for_metadata(repeats, overlaps or not reads_sizes)
    return clock.time(reads_sizes)


@lru_cache(maxsize=100_000)
def edge_time(load: Workload, grid: Grid, machine: Machine, is_last: bool) -> PassTime:
    """Time of the embedding, or of output layer and loss."""
    clock = _LayerClock(machine, 1.0, load.graphs)
    clock.add(output_part(load, grid) if is_last else embedding_part(load, grid))
    return clock.time()


def _seconds_during_rows(
    load: Workload, grid: Grid, machine: Machine, works: Sequence[Work], exchange: float
) -> float:
    """Seconds of an exchange during which this rank computes, `works` on each of its two ways."""
    # Shared experts compute on the way there, these on the way back (`moe/layer.py`). The combined
    # schedule has its own rule. With expert-tensor parallelism rows are gathered, too: left out.
    travels = load.experts.dispatcher in TRAVELLING and grid.ep > 1 and grid.etp == 1
    is_combined = grid.expert_overlap or grid.unpaired
    if is_combined or not travels or load.experts.is_vanilla:
        return 0.0
    most = exchange / 2 * (1.0 - machine.reached.overlap_slowdown)
    return sum(min(work.seconds(machine), most) for work in works)


# The part of a layer that each scope of CUDA graphs covers (megatron-core, transformer/enums.py).
_SCOPES = {
    "attention": ("attn",),
    "norms": ("attn",),
    "router": ("moe_router", "moe"),
    "shared_expert": ("moe_router", "moe"),
    "dense_ffn": ("mlp",),
    "permutation": ("moe",),
    "experts": ("moe",),
    "zero_computation": ("moe",),
}
# Parts before the host reads how many rows each expert has: there the queue of the GPU runs empty,
# and the host has no lead over what comes after.
_BEFORE_SIZES = ("attention", "norms", "router")
_ALL_BEFORE_SIZES = {"attn", "moe_router", "moe_preprocess"}


class _LayerClock:
    """Adds up a pass: what the GPU needs, and what the host needs to issue it."""

    def __init__(self, machine: Machine, slower: float, graphs: frozenset[str]) -> None:
        self._machine, self._slower, self._graphs = machine, slower, graphs
        self._forward = self._backward = 0.0
        # Of the forward pass, the time before the sizes are read.
        self._before = 0.0
        self._issue_before = self._issue_after = self._issue_backward = 0.0
        self._seconds: dict[str, float] = defaultdict(float)
        self._hidden: dict[str, float] = defaultdict(float)

    def add(self, part: LayerPart) -> None:
        works = part.forward, part.backward, part.again
        ahead, back, again = (work.seconds(self._machine) * self._slower for work in works)
        self._forward += ahead
        self._backward += back + again
        self._seconds[part.name] += ahead + back
        if again:
            self._seconds[RECOMPUTE] += again
        scopes = {"full_iteration", *_SCOPES.get(part.name, ())}
        launch_s = 0.0 if self._graphs & scopes else self._machine.reached.launch_s
        if part.name in _BEFORE_SIZES:
            self._before += ahead
            self._issue_before += launch_s * part.forward.kernels
        else:
            self._issue_after += launch_s * part.forward.kernels
        self._issue_backward += launch_s * (part.backward.kernels + part.again.kernels)

    def communicate(self, name: str, forward: float, backward: float) -> None:
        if forward + backward == 0:
            return
        self._forward += forward
        self._backward += backward
        self._seconds[name] += forward + backward

    def hide(self, name: str, forward: float, backward: float) -> None:
        """Take seconds of communication that run during computation out of those that count."""
        self.communicate(name, -forward, -backward)
        if forward + backward > 0:
            self._hidden[name] += forward + backward

    def wait_for_metadata(self, times: int, overlaps: bool) -> None:
        """Ranks exchange how many tokens come, and wait for the last one."""
        reached = self._machine.reached
        # Ranks whose hosts only start graphs arrive together.
        together = overlaps or self._graphs >= _ALL_BEFORE_SIZES
        seconds = reached.metadata_overlapped_s if together else reached.metadata_s
        self.communicate(METADATA, seconds, (times - 1) * seconds)

    def exchange(self, forward: float, backward: float, hideable: float) -> None:
        self.communicate(EXCHANGE, forward, backward)
        if hideable:
            # Forward of one micro-batch runs with backward of another: they share the cover.
            seconds = forward + backward
            cover = self._forward + self._backward - seconds
            share = min(hideable * seconds, cover) / seconds
            self.hide(EXCHANGE, forward * share, backward * share)

    def time(self, reads_sizes: bool = False) -> PassTime:
        """The sum; experts make the host read how many rows each has, for their products."""
        before, after = self._before, self._forward - self._before
        if reads_sizes:
            lead = max(after - self._issue_after, 0.0)
            idle = max(self._issue_after - after, 0.0)
            idle += max(self._issue_before - lead - before, 0.0)
        else:
            idle = max(self._issue_before + self._issue_after - self._forward, 0.0)
        idle_back = max(self._issue_backward - self._backward, 0.0)
        if idle + idle_back:
            self._seconds[HOST] += idle + idle_back
        forward, backward = self._forward + idle, self._backward + idle_back
        return PassTime(forward, backward, dict(self._seconds), dict(self._hidden))
