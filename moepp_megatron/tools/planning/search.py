"""Cost and memory of every legal layout of a model on a number of GPUs, as plain integers.

Legal is what `check_config` and `check_world_size` accept, written again here because a hundred
thousand configurations cannot be built and checked in seconds; tests compare both. Left out,
because they never win: tensor parallelism beyond a node, context parallelism with less than 4,096
tokens per rank, experts split over other ranks than 1 or TP, stages uneven without need.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from operator import itemgetter

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.config.schema.moe import HIDDEN_ALIGNMENT
from moepp_megatron.config.stages import Stages
from moepp_megatron.tools.planning import memory, pipeline, step
from moepp_megatron.tools.planning.grid import FULL, Dispatcher, Grid, Recompute, States
from moepp_megatron.tools.planning.imbalance import Load
from moepp_megatron.tools.planning.layer_time import layer_time
from moepp_megatron.tools.planning.machine import Machine
from moepp_megatron.tools.planning.overlay import with_states
from moepp_megatron.tools.planning.workload import LatentAttention, NumberFormats, Workload

# arXiv 2603.07685, section 9.1: below this, context parallelism costs more than it gives.
_LEAST_TOKENS_PER_CONTEXT_RANK = 4096
_MICRO_BATCHES = (1, 2, 4, 8, 16)
# Nothing first, so that what it leaves room for need not be tried (`plan.search_layouts`).
_SOME: tuple[Recompute, ...] = (("layernorm", "moe_act"), ("moe_act",), ("core_attn",), ("moe",))
_RECOMPUTE: tuple[Recompute, ...] = ((), *_SOME, FULL)
# With latent attention, its expansions are cheap to repeat and large to keep.
_LATENT: tuple[Recompute, ...] = (
    ("mla_up_proj",),
    ("mla_up_proj", "moe_act"),
    ("layernorm", "mla_up_proj", "moe_act"),
)
# The same: what is kept in bf16 only where fp32 leaves no room, and, because that rounds, only
# for a step shorter by `_LEAST_GAIN`.
_STATES: tuple[States, ...] = ((), ("moments",), ("moments", "gradients"))
_LEAST_GAIN = 0.1
_UNEVEN_CHUNKS = (2, 4, 8)
_NEAREST_MISSES = 5
# Layouts that rules beyond the degrees of parallelism may still refuse, or that only differ in
# micro-batch, chunks and recomputation.
_KEPT = 5_000
# What the combined schedule of forward and backward cannot repeat (rules/expert_overlap.py).
_NOT_WITH_OVERLAP = {"layernorm", "moe", "full"}


class _LayoutCosts:
    """Costs of layouts of one model on one machine, each with the fastest of `dispatchers`."""

    def __init__(
        self,
        load: Workload,
        machine: Machine,
        dispatchers: Sequence[Dispatcher] = (),
        states: Mapping[States, NumberFormats] | None = None,
    ) -> None:
        self._load, self._machine = load, machine
        self._dispatchers = dispatchers
        numbers = states or {(): load.numbers}
        by_name = {None: load} | {name: load.with_dispatcher(name) for name in dispatchers}
        self._loads = {
            (name, kept): replace(load, numbers=numbers[kept])
            for name, load in by_name.items()
            for kept in numbers
        }
        # Of layouts that differ otherwise, the fastest dispatcher is the same.
        self._fastest_of = cache(self._fastest)

    def named(self, grid: Grid) -> Grid:
        """The layout with its dispatcher's name, where there was a choice."""
        name = self._dispatcher(grid) if any(self._load.is_moe) else None
        return grid if name is None else replace(grid, dispatcher=name)

    def memory(self, grid: Grid) -> float:
        """Peak memory of the fullest rank, CUDA and NCCL included, bytes."""
        load, stages = self._loads[self._dispatcher(grid), grid.states], self._stages(grid)
        needed = memory.fullest_rank(load, grid, stages, self._fullness(grid).p99)
        return needed.total + self._machine.reached.reserved_gib * memory.GIB

    def seconds(self, grid: Grid) -> float:
        """Time of a step."""
        load, skew = self._loads[self._dispatcher(grid), grid.states], self._fullness(grid).mean
        return step.critical_path(load, grid, self._machine, skew, self._stages(grid)).seconds

    def _stages(self, grid: Grid) -> Stages:
        return pipeline.even_stages(self._load.layers, grid.pp, grid.vpp)

    def _fullness(self, grid: Grid) -> Load:
        return step.expert_load(self._load, grid)

    def _dispatcher(self, grid: Grid) -> Dispatcher | None:
        return self._fastest_of(grid.layer_key) if self._dispatchers else None

    def _fastest(self, grid: Grid) -> Dispatcher:
        """The dispatcher whose layers are fastest; equals go to the first."""
        experts, skew = self._load.experts, self._fullness(grid).mean
        rows = memory.fullest_rows(self._load, grid, skew)
        allowed = set(self._dispatchers)
        if grid.expert_overlap:
            # What the combined schedule can free when the call returns (rules/expert_overlap.py).
            allowed &= {"alltoall", "flex"}
        if grid.ep * grid.etp == 1:
            allowed -= {"flex"}
        if grid.ep in (1, experts.num_ffn_experts) or experts.router_topk == 1:
            allowed -= {"alltoall_dedup"}
        assert allowed, "alltoall is always allowed"

        def seconds(name: Dispatcher) -> float:
            load = self._loads[name, ()]
            return layer_time(load, grid, self._machine, True, rows, skew).total

        return min((name for name in self._dispatchers if name in allowed), key=seconds)


@dataclass(frozen=True)
class Space:
    """The space of a search."""

    world: int  # GPUs
    per_node: int  # GPUs of a node
    load: Workload  # the model and its batch
    groups_are_set: bool  # whether key/value heads are given, so that tensor ranks must fit them
    can_overlap: bool  # whether the configuration allows the combined schedule
    distributed_optimizer: bool  # whether optimizer state is sharded
    dispatchers: tuple[Dispatcher, ...]  # dispatchers that are compared where tokens travel
    # Number formats by what is kept in bf16.
    states: Mapping[States, NumberFormats]

    @classmethod
    def of(cls, config: Config, world: int, per_node: int) -> Space:
        """The space of a configuration; its own layout does not matter."""
        load = Workload.from_config(config)
        is_static = load.experts.static_rows is not None
        return cls(
            world=world,
            per_node=per_node,
            load=load,
            groups_are_set=config.model.num_query_groups is not None,
            can_overlap=config.precision.dtype == "bf16"
            and not config.training.cuda_graphs
            and not load.experts.shares_constants
            and not is_static,
            distributed_optimizer=config.parallel.use_distributed_optimizer,
            dispatchers=() if is_static else _dispatchers(config),
            states=_states(config),
        )

    def costs(self, machine: Machine) -> _LayoutCosts:
        """Costs of these layouts."""
        return _LayoutCosts(self.load, machine, self.dispatchers, self.states)

    def grids(self) -> Iterator[Grid]:
        """All layouts, each once."""
        for tp in self._tensor():
            for cp in self._context(tp):
                for pp in self._stages(self.world // (tp * cp)):
                    yield from self._of_stages(tp, cp, pp)

    def _of_stages(self, tp: int, cp: int, pp: int) -> Iterator[Grid]:
        load = self.load
        if pp > load.layers:
            return
        dp = self.world // (tp * cp * pp)
        for vpp in self._virtual(pp):
            for micro_batch in _MICRO_BATCHES:
                # The interleaved schedule takes micro-batches in groups of one a pipeline rank.
                unit = micro_batch * dp * (pp if vpp > 1 else 1)
                if load.batch % unit:
                    continue
                for ep, etp in self._experts(tp, pp):
                    grid = Grid(self.world, tp, cp, pp, vpp, ep, etp, micro_batch)
                    yield from self._of_choices(grid)

    def _of_choices(self, grid: Grid) -> Iterator[Grid]:
        overlaps = self.can_overlap and grid.ep > 1 and (grid.pp == 1 or grid.vpp > 1)
        is_sharded, others = self.distributed_optimizer, grid.dp * grid.cp > 1
        # Flex needs more than one rank; where no token travels, any will do.
        needs_others = self.load.experts.dispatcher == "flex" and grid.ep * grid.etp == 1
        grid = replace(
            grid,
            distributed_optimizer=is_sharded,
            grad_overlap=others,
            param_overlap=is_sharded and others,
            dispatcher="alltoall" if needs_others else None,
        )
        for states, recompute in product(self.states, self._recompute):
            for overlap in (False, True) if overlaps else (False,):
                if not (overlap and _NOT_WITH_OVERLAP & set(recompute)):
                    yield replace(grid, recompute=recompute, expert_overlap=overlap, states=states)

    @property
    def _recompute(self) -> tuple[Recompute, ...]:
        """List recomputation choices by the modules that the model has."""
        sets = _RECOMPUTE
        if isinstance(self.load.attention, LatentAttention):
            sets += _LATENT
            if not all(self.load.is_moe):
                sets += (("mla_up_proj", "mlp"),)
        if self.load.experts.static_rows is not None:
            # Their experts never keep what `moe_act` repeats.
            return tuple(modules for modules in sets if "moe_act" not in modules)
        return sets

    def _tensor(self) -> list[int]:
        load, attention = self.load, self.load.attention
        widths = [attention.heads, load.vocab]
        if not all(load.is_moe):
            widths.append(load.dense_size)
        if load.experts.shared_size:
            widths.append(load.experts.shared_size)
        groups = getattr(attention, "groups", attention.heads)
        return [
            tp
            for tp in _divisors(self.world)
            if tp <= self.per_node
            and all(width % tp == 0 for width in widths)
            and not (self.groups_are_set and groups % tp and tp % groups)
            and load.seq % tp == 0
        ]

    def _context(self, tp: int) -> list[int]:
        seq = self.load.seq
        most = max(seq // _LEAST_TOKENS_PER_CONTEXT_RANK, 1)
        return [
            cp
            for cp in _divisors(self.world // tp)
            if cp == 1 or (cp <= most and seq % (2 * cp * tp) == 0)
        ]

    def _stages(self, ranks: int) -> Sequence[int]:
        """Possible numbers of stages: one if all layers share constants (rules/moe.py)."""
        return [1] if self.load.experts.shares_constants else _divisors(ranks)

    def _virtual(self, pp: int) -> list[int]:
        """Chunks per rank: layers even over stages, or with embedding and loss as a layer each."""
        # Where no number of chunks is (61 layers), stages differ by a layer.
        layers = self.load.layers
        if pp == 1:
            return [1]
        most = layers // pp
        even = [
            vpp
            for vpp in range(1, most + 1)
            if vpp == 1 or layers % (pp * vpp) == 0 or (layers + 2) % (pp * vpp) == 0
        ]
        return even if len(even) > 1 else [1, *(vpp for vpp in _UNEVEN_CHUNKS if vpp <= most)]

    def _experts(self, tp: int, pp: int) -> Iterator[tuple[int, int]]:
        experts = self.load.experts
        for etp in sorted({1, tp}):
            if experts.ffn_size % etp or (etp > 1 and experts.static_rows is not None):
                continue
            for ep in _divisors(experts.num_ffn_experts):
                if self.world % (ep * etp * pp) == 0:
                    yield ep, etp


def _dispatchers(config: Config) -> tuple[Dispatcher, ...]:
    """The configuration's dispatcher first, and those that may take its place."""
    configured: Dispatcher = config.moe.dispatcher
    others: list[Dispatcher] = ["alltoall"]
    if not config.moe.is_vanilla:
        others.append("alltoall_dedup")
    if config.precision.dtype == "bf16" and config.model.hidden_size % HIDDEN_ALIGNMENT == 0:
        others.append("flex")
    return (configured, *(other for other in others if other != configured))


def _states(config: Config) -> dict[States, NumberFormats]:
    """The configuration's number formats first, and those with less that its rules accept."""
    found: dict[States, NumberFormats] = {}
    for states in _STATES:
        try:
            changed = with_states(config, states)
        except ConfigError:
            continue
        numbers = Workload.from_config(changed).numbers
        if numbers not in found.values():
            found[states] = numbers
    return found


@cache
def _divisors(number: int) -> Sequence[int]:
    """All divisors, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


@dataclass
class Search:
    """Result of the search over all layouts of one model."""

    # (seconds, layout, bytes), fastest first; (bytes, layout) of the nearest misses.
    best: list[tuple[float, Grid, float]] = field(default_factory=list)
    misses: list[tuple[float, Grid]] = field(default_factory=list)
    legal: int = 0  # number of legal layouts
    too_large: int = 0  # of them, those that do not fit


def search_layouts(config: Config, world: int, machine: Machine) -> Search:
    """Cost and memory of every legal layout."""
    space = Space.of(config, world, machine.per_node)
    costs = space.costs(machine)
    search = Search()
    fitting: list[tuple[float, Grid, float]] = []
    missing: list[tuple[float, Grid]] = []
    # What fits without states in bf16, or with fewer, and without recomputation.
    roomy: set[tuple[bool, Recompute]] = set()
    for grid in space.grids():
        search.legal += 1
        if not (grid.states or grid.recompute or grid.expert_overlap):
            # The first of the choices within the same degrees.
            roomy.clear()
        elif not roomy.isdisjoint((grid.expert_overlap, done) for done in {(), grid.recompute}):
            # It repeats computation, or keeps fewer bits, without need.
            continue
        needed = costs.memory(grid)
        if needed > machine.usable_bytes:
            missing.append((needed, grid))
            continue
        roomy.add((grid.expert_overlap, grid.recompute))
        fitting.append((costs.seconds(grid), grid, needed))
    search.too_large = len(missing)
    # Both keep the order of equals.
    nearest = heapq.nsmallest(_NEAREST_MISSES, missing, key=itemgetter(0))
    search.misses = [(needed, costs.named(grid)) for needed, grid in nearest]
    fitting.sort(key=itemgetter(0))
    chosen, exact = fitting, [entry for entry in fitting if not entry[1].states]
    if exact and fitting[0][0] > exact[0][0] * (1.0 - _LEAST_GAIN):
        chosen = exact
    search.best = [(seconds, costs.named(grid), needed) for seconds, grid, needed in chosen[:_KEPT]]
    return search
