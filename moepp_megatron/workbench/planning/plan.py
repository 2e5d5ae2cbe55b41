"""The plan: the best layouts of MoE++ and of its vanilla baseline, and why the others lose."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moepp_megatron.config import Config, ConfigError, load_config, with_overrides
from moepp_megatron.config.hardware import load_hardware, nearest_hardware
from moepp_megatron.config.vanilla import vanilla, without_budget
from moepp_megatron.workbench.planning.coster import Cost, Coster
from moepp_megatron.workbench.planning.grid import Grid
from moepp_megatron.workbench.planning.imbalance import LEARNED, AssumedRouting
from moepp_megatron.workbench.planning.machine import Machine, machine_of
from moepp_megatron.workbench.planning.overlay import config_of
from moepp_megatron.workbench.planning.planned import Planned, planned_of
from moepp_megatron.workbench.planning.recorded_routing import recorded_routing
from moepp_megatron.workbench.planning.search import Space
from moepp_megatron.workbench.planning.workload import Workload

# Candidates of another tau.
_FIRST = 100
_NEAREST_MISSES = 5

_LOSSES = ("work", "recompute", "network", "bubble", "end")


@dataclass
class Search:
    """Result of the search over all layouts of one model.

    Attributes:
        best: (seconds, layout, cost, bytes) of those that fit, fastest first.
        misses: (bytes, layout) of those that come closest to fitting.
        legal: Number of legal layouts.
        over: Bytes by which each of the others is too large.
        lost: Number of layouts that lose most by each of `_LOSSES`, against the best.
        gaps: The median loss of those, as a share of the best step.
    """

    best: list[tuple[float, Grid, Cost, float]] = field(default_factory=list)
    misses: list[tuple[float, Grid]] = field(default_factory=list)
    legal: int = 0
    over: list[float] = field(default_factory=list)
    lost: dict[str, int] = field(default_factory=dict)
    gaps: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The result.

    Attributes:
        config: The planned configuration.
        world: GPUs.
        machine: The kind of GPU.
        routing: Unevenness of the routing.
        layouts: The configured model, best first; layouts that do not fit only if none does.
        baselines: The best layout of the vanilla model and of each further tau.
        search: Result of the search.
    """

    config: Config
    world: int
    machine: Machine
    routing: AssumedRouting
    layouts: list[Planned]
    baselines: list[Planned]
    search: Search

    @property
    def best(self) -> Planned | None:
        """The fastest that fits."""
        return self.layouts[0] if self.layouts and self.layouts[0].fits else None

    def hours(self, planned: Planned, tokens: float) -> float:
        """Hours to train on this many tokens."""
        return tokens / (planned.tokens_per_s_per_gpu * self.world) / 3600


def plan(
    config: Config | str | Path,
    *overrides: str,
    gpus: int = 8,
    gpu: str = "h100_sxm",
    taus: Sequence[float] = (0.25, 0.5, 1.0),
    routing: str | Path | None = None,
    top: int = 5,
) -> Plan:
    """Search every legal layout of a model on a number of GPUs, as `moepp plan` does.

    Estimates from a cost model: nothing is run, no torch is imported.

    Args:
        config: A configuration, or its YAML file; its own layout does not matter.
        overrides: Settings `section.key=value` over it.
        gpus: GPUs.
        gpu: Their kind: a name in configs/hardware, or a YAML file.
        taus: Further weights of zero-computation experts to set beside the configured one.
        routing: A run, or its metrics.jsonl, whose routing was as uneven as this one's will be.
        top: Layouts to keep.

    Returns:
        Layouts, best first, with seconds per step and bytes per GPU (`Planned`), and baselines.

    Raises:
        ConfigError: Same as `make_plan`; also for a configuration, GPU or run that cannot be read.
    """
    if not isinstance(config, Config):
        config = load_config(config, overrides)
    elif overrides:
        config = with_overrides(config, overrides)
    machine, moe = machine_of(load_hardware(nearest_hardware(gpu))), config.moe
    evenness = LEARNED
    if routing is not None:
        evenness = recorded_routing(Path(routing), moe.num_ffn_experts, moe.router_topk)
    return make_plan(config, gpus, machine, evenness, taus, top)


def make_plan(
    config: Config,
    world: int,
    machine: Machine,
    routing: AssumedRouting,
    taus: Sequence[float] = (),
    top: int = 5,
) -> Plan:
    """Search all layouts.

    Args:
        config: A checked configuration; its own layout does not matter.
        world: GPUs.
        machine: The kind of GPU.
        routing: Unevenness of the routing.
        taus: Further weights of zero-computation experts to set beside the configured one.
        top: Layouts to keep of each model.

    Raises:
        ConfigError: If the GPUs lack the configured format, or no layout is legal.
    """
    check_formats(config, machine)
    search = search_layouts(config, world, machine, routing)
    if search.legal == 0:
        raise ConfigError(
            f"--gpus ({world}) must allow a legal layout of this model and of "
            f"training.global_batch_size ({config.training.global_batch_size}); use a number of "
            "GPUs that divides the batch, such as a power of two"
        )
    layouts = _accepted(config, search, world, machine, routing, top)
    baselines = []
    if not config.moe.is_vanilla:
        baselines += best_layouts(vanilla(config), world, machine, routing)
        for tau in taus:
            if tau != config.moe.tau:
                baselines += _best_again(_with_tau(config, tau), search, world, machine, routing)
    return Plan(config, world, machine, routing, layouts, baselines, search)


def search_layouts(config: Config, world: int, machine: Machine, routing: AssumedRouting) -> Search:
    """Cost and memory of every legal layout."""
    space = Space.of(config, world, machine.per_node)
    coster = Coster(space.load, machine, routing)
    search = Search()
    fitting: list[tuple[float, int, Grid, Cost, float]] = []
    missing: list[tuple[float, int, Grid]] = []
    for number, grid in enumerate(space.grids()):
        held = coster.memory(grid)
        if held > machine.memory_bytes:
            missing.append((held, number, grid))
        else:
            cost = coster.cost(grid)
            fitting.append((cost.total, number, grid, cost, held))
    search.legal = len(fitting) + len(missing)
    search.over = [held - machine.memory_bytes for held, *_ in missing]
    search.misses = [(held, grid) for held, _, grid in heapq.nsmallest(_NEAREST_MISSES, missing)]
    fitting.sort(key=lambda entry: entry[:2])
    search.best = [(total, grid, cost, held) for total, _, grid, cost, held in fitting]
    if fitting:
        _count_losses(search, fitting[0][3], [cost for *_, cost, _ in fitting])
    return search


def _count_losses(search: Search, best: Cost, costs: Sequence[Cost]) -> None:
    """Count by which cost each layout loses most, against the best."""
    gaps: dict[str, list[float]] = {name: [] for name in _LOSSES}
    for cost in costs:
        if cost.total > best.total:
            excess = {name: getattr(cost, name) - getattr(best, name) for name in _LOSSES}
            gaps[max(excess, key=lambda name: excess[name])].append(cost.total / best.total - 1)
    for name, values in gaps.items():
        if values:
            search.lost[name] = len(values)
            search.gaps[name] = sorted(values)[len(values) // 2]


def _accepted(
    config: Config, search: Search, world: int, machine: Machine, routing: AssumedRouting, top: int
) -> list[Planned]:
    """The best layouts that the configuration's rules accept as well.

    Only one layout of each set of degrees of parallelism is kept: others differ only in
    micro-batch, recomputation or model chunks.
    """
    candidates = [(grid, held, True) for _, grid, _, held in search.best]
    candidates += [(grid, held, False) for held, grid in search.misses]
    found: list[Planned] = []
    for grid, held, fits in candidates:
        if len(found) == top or (found and found[0].fits and not fits):
            break
        if any(_degrees(grid) == _degrees(planned.grid) for planned in found):
            continue
        try:
            config_of(config, grid)
        except ConfigError:
            # A rule beyond the degrees of parallelism, such as FP8's alignment.
            continue
        found.append(planned_of(config, grid, held, fits, machine, routing))
    return found


def _degrees(grid: Grid) -> tuple[int, ...]:
    return (grid.tp, grid.cp, grid.pp, grid.ep, grid.etp)


def best_layouts(
    config: Config, world: int, machine: Machine, routing: AssumedRouting, top: int = 1
) -> list[Planned]:
    """The best layouts of one model alone; ones that do not fit only if none does."""
    search = search_layouts(config, world, machine, routing)
    return _accepted(config, search, world, machine, routing, top)


def _best_again(
    config: Config, search: Search, world: int, machine: Machine, routing: AssumedRouting
) -> list[Planned]:
    """The best layout of the same model with another tau, among the first of `search`.

    tau changes how many rows experts compute, not what is legal and little of what fits: the best
    layout is among the first hundred.
    """
    coster = Coster(Workload.from_config(config), machine, routing)
    again = Search()
    for _, grid, _, _ in search.best[:_FIRST]:
        held = coster.memory(grid)
        if held <= machine.memory_bytes:
            cost = coster.cost(grid)
            again.best.append((cost.total, grid, cost, held))
        else:
            again.misses.append((held, grid))
    again.best.sort(key=lambda entry: entry[0])
    return _accepted(config, again, world, machine, routing, top=1)


def _with_tau(config: Config, tau: float) -> Config:
    return with_overrides(without_budget(config), [f"moe.tau={tau}"])


def check_formats(config: Config, machine: Machine) -> None:
    """Refuse number formats that the GPU has no rate for.

    Raises:
        ConfigError: If it has none.
    """
    hardware, precision = machine.hardware, config.precision
    if hardware.peak_tflops(precision.dtype, precision.fp8) is None:
        name = "precision.fp8" if precision.fp8 else "precision.dtype"
        value = precision.fp8 or precision.dtype
        raise ConfigError(
            f"{name} ({value}) must be a format of {hardware.name}, which has none such; set "
            "precision.fp8 to null, or plan for another GPU"
        )
