"""The plan: the best layouts of MoE++ and of its vanilla baseline."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from moepp_megatron.config import (
    Config,
    ConfigError,
    load_config,
    parse_config,
    with_overrides,
)
from moepp_megatron.config.flops import training_flops_per_token
from moepp_megatron.config.hardware import load_hardware
from moepp_megatron.config.sections import used
from moepp_megatron.config.vanilla import vanilla
from moepp_megatron.tools.planning.grid import Grid
from moepp_megatron.tools.planning.machine import Machine
from moepp_megatron.tools.planning.memory import GIB
from moepp_megatron.tools.planning.overlay import config_of, settings_of
from moepp_megatron.tools.planning.search import Search, Space, search_layouts
from moepp_megatron.tools.planning.step import StepTime, step_time
from moepp_megatron.tools.planning.workload import Workload

# Candidates of another tau; ties that are tried against the configuration's rules.
_FIRST, _TRIED = 100, 50
# Layouts are ties within this of the fastest: ratios of published runs come out no better.
TIE = 0.03


@dataclass(frozen=True)
class Planned:
    """One layout of one model."""

    grid: Grid  # the layout
    kind: Literal["moepp", "vanilla"]  # the model
    tau: float | None  # weight of its zero-computation experts; None for vanilla
    ffn_share: float  # phi; 1 for vanilla
    fits: bool  # whether the fullest rank fits the GPU
    memory_gib: float  # memory of the fullest rank, GiB, libraries included
    step: StepTime  # time of a step
    tokens_per_s_per_gpu: float  # throughput of a GPU
    # Model TFLOP/s of a GPU, as `metrics.jsonl` counts them (config/flops.py).
    tflops_per_gpu: float
    mfu: float  # their share of the rated rate
    # Step of this model in the fastest layout of the vanilla one, seconds; None where it has none.
    shared_step_s: float | None = None

    def run_seconds(self, tokens: float) -> float:
        """Time of the steps that read this many tokens, seconds."""
        return tokens / (self.tokens_per_s_per_gpu * self.grid.world)

    def record(self, layers: int) -> dict[str, Any]:
        """A dictionary for JSON; the contract's keys come first."""
        settings = settings_of(self.grid, layers)
        return {
            "layout": {key: value for keys in settings.values() for key, value in keys.items()},
            "kind": self.kind,
            "tau": self.tau,
            "fits": self.fits,
            "memory_gib": round(self.memory_gib, 3),
            "step_time_s": self.step.total,
            "tokens_per_s_per_gpu": self.tokens_per_s_per_gpu,
            "tflops_per_gpu": self.tflops_per_gpu,
            "a2a_bytes": round(self.step.exchange_bytes),
            "ffn_share": self.ffn_share,
            "mfu": self.mfu,
            "shared_layout_step_time_s": self.shared_step_s,
            "seconds": dict(self.step.seconds),
            "hidden_seconds": dict(self.step.hidden),
            "rank_load": asdict(self.step.load),
        }


def _planned_of(config: Config, grid: Grid, needed: float, fits: bool, machine: Machine) -> Planned:
    """A layout with its numbers."""
    load = Workload.from_config(config)
    step = step_time(load, grid, machine)
    rate = load.batch * load.seq / step.total / grid.world
    tflops = rate * training_flops_per_token(config, config.moe.ffn_share) / 1e12
    peak = machine.hardware.peak_tflops(config.precision.dtype, config.precision.fp8)
    assert peak is not None, "formats were checked"
    is_vanilla = config.moe.num_zero_computation_experts == 0
    return Planned(
        grid=grid,
        kind="vanilla" if is_vanilla else "moepp",
        tau=None if is_vanilla else config.moe.balanced_tau,
        ffn_share=config.moe.ffn_share,
        fits=fits,
        memory_gib=needed / GIB,
        step=step,
        tokens_per_s_per_gpu=rate,
        tflops_per_gpu=tflops,
        mfu=tflops / peak,
    )


@dataclass(frozen=True)
class Plan:
    """The result."""

    config: Config  # the planned configuration
    world: int  # GPUs
    machine: Machine  # the kind of GPU
    # The configured model: the plan, which is the simplest of those within `TIE` of the fastest,
    # then others by time; layouts that do not fit only if none does.
    layouts: list[Planned]
    # The configured model in its fastest layout, for comparison with `baselines`.
    fastest: Planned | None
    baselines: list[Planned]  # the fastest layout of the vanilla model and of each further tau
    search: Search  # result of the search

    @property
    def best(self) -> Planned | None:
        """The plan: see `layouts`."""
        return self.layouts[0] if self.layouts and self.layouts[0].fits else None


def plan(
    config: Config | str | Path,
    *overrides: str,
    gpus: int = 8,
    gpu: str = "h100_sxm",
    taus: Sequence[float] = (0.25, 0.5, 1.0),
    top: int = 5,
) -> Plan:
    """Search every legal layout of a model on a number of GPUs, as `moepp plan` does.

    Estimates from a cost model: nothing is run, no torch is imported.

    Args:
        config: A configuration, or its YAML file; its own layout does not matter.
        overrides: Settings `section.key=value` over it.
        gpus: Their number.
        gpu: Their kind: a name in configs/hardware, or a YAML file.
        taus: Further weights of zero-computation experts.
        top: Layouts to keep.

    Returns:
        Layouts, best first, with seconds per step and bytes per GPU (`Planned`), and baselines.

    Raises:
        ConfigError: A configuration or GPU cannot be read, the GPU lacks its format, no layout is
            legal, or there is a teacher, whose time and memory this does not count.
    """
    if not isinstance(config, Config):
        config = load_config(config, overrides)
    elif overrides:
        config = with_overrides(config, overrides)
    return _make_plan(config, gpus, Machine.of(load_hardware(gpu)), taus, top)


def _make_plan(
    config: Config,
    world: int,
    machine: Machine,
    taus: Sequence[float] = (),
    top: int = 5,
) -> Plan:
    """Search all layouts of a checked configuration; errors as `plan`."""
    _check(config, machine)
    search = search_layouts(config, world, machine)
    if search.legal == 0:
        raise ConfigError(
            f"--gpus ({world}) must allow a legal layout of this model and of "
            f"training.global_batch_size ({config.training.global_batch_size}); use a number of "
            "GPUs that divides the batch, such as a power of two"
        )
    layouts = _accepted(config, search, machine, top, prefers_simple=True)
    first = _accepted(config, search, machine, 1)
    fastest = first[0] if first and first[0].fits else None
    baselines = []
    if not config.moe.is_vanilla:
        plain = vanilla(config)
        vanilla_search = search_layouts(plain, world, machine)
        baselines += _accepted(plain, vanilla_search, machine, top=1)
        shared = baselines[0].grid if baselines else None
        if fastest is not None:
            fastest = _in_both(fastest, config, shared, machine)
        for tau in taus:
            if tau != config.moe.tau:
                content = config.model_dump(mode="json", exclude_unset=True)
                content["moe"].pop("budget", None)
                changed = parse_config(content | {"moe": content["moe"] | {"tau": tau}})
                again = _best_again(changed, search, world, machine)
                baselines += [_in_both(one, changed, shared, machine) for one in again]
    return Plan(config, world, machine, layouts, fastest, baselines, search)


def _check(config: Config, machine: Machine) -> None:
    """Refuse a teacher, and number formats that the GPU has no rate for."""
    hardware, precision = machine.hardware, config.precision
    for name, value in used(config, "checkpoint"):
        raise ConfigError(
            f"{name} ({value}) must be null for a plan, which does not count a second model; use "
            f"{name}=null here, and moepp train --dry-run with it for the memory of a layout"
        )
    if hardware.peak_tflops(precision.dtype, precision.fp8) is None:
        name = "precision.fp8" if precision.fp8 else "precision.dtype"
        value = precision.fp8 or precision.dtype
        raise ConfigError(
            f"{name} ({value}) must be a format of {hardware.name}, which has none such; set "
            "precision.fp8 to null, or plan for another GPU"
        )


def _accepted(
    config: Config,
    search: Search,
    machine: Machine,
    top: int,
    prefers_simple: bool = False,
) -> list[Planned]:
    """The best layouts that the configuration's rules accept as well."""
    accepted: list[Planned] = []
    candidates = [(grid, needed, True) for _, grid, needed in search.best]
    if prefers_simple:
        candidates = [*_simplest(config, search), *candidates]
    candidates += [(grid, needed, False) for needed, grid in search.misses]
    for grid, needed, fits in candidates:
        if len(accepted) == top or (accepted and accepted[0].fits and not fits):
            break
        is_new = all(_degrees(grid) != _degrees(planned.grid) for planned in accepted)
        if is_new and (changed := _in_layout(config, grid)) is not None:
            accepted.append(_planned_of(changed, grid, needed, fits, machine))
    return accepted


def _simplest(config: Config, search: Search) -> Iterator[tuple[Grid, float, bool]]:
    """Layouts within `TIE` of the fastest, the simplest first; equals by time."""
    ties = [entry for entry in search.best if entry[0] <= search.best[0][0] * (1.0 + TIE)]
    # Sorting keeps the order of equals.
    for _, grid, needed in sorted(ties, key=lambda tie: _complexity(tie[1], config))[:_TRIED]:
        if _in_layout(config, grid) is not None:
            yield grid, needed, True
            return


def _in_layout(config: Config, grid: Grid) -> Config | None:
    """The configuration in a layout; None if a rule refuses it, such as FP8's alignment."""
    try:
        return config_of(config, grid)
    except ConfigError:
        return None


def _in_both(planned: Planned, config: Config, grid: Grid | None, machine: Machine) -> Planned:
    """The model in its layout, with its step in the vanilla model's, whose rows are more."""
    if grid is None or (changed := _in_layout(config, grid)) is None:
        return planned
    step = step_time(Workload.from_config(changed), grid, machine)
    return replace(planned, shared_step_s=step.total)


def _complexity(grid: Grid, config: Config) -> int:
    """Count a layout's extras: degrees, schedules, recomputation, packages."""
    other = grid.dispatcher not in (None, config.moe.dispatcher)
    return sum(map(len, (grid.splits, grid.recompute, grid.states))) + grid.expert_overlap + other


def _degrees(grid: Grid) -> tuple[int, ...]:
    return (grid.tp, grid.cp, grid.pp, grid.ep, grid.etp)


def _best_again(config: Config, search: Search, world: int, machine: Machine) -> list[Planned]:
    """The best layout of the same model with another tau, among the first of `search`."""
    # tau changes how many rows experts compute, not what is legal and little of what fits: the best
    # layout is among the first hundred.
    costs = Space.of(config, world, machine.per_node).costs(machine)
    again = Search()
    for _, grid, _ in search.best[:_FIRST]:
        needed = costs.memory(grid)
        if needed <= machine.usable_bytes:
            again.best.append((costs.seconds(grid), costs.named(grid), needed))
        else:
            again.misses.append((needed, costs.named(grid)))
    again.best.sort(key=lambda entry: entry[0])
    return _accepted(config, again, machine, top=1)
