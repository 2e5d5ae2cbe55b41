"""`moepp plan` on the terminal and as JSON."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.table import Table

from moepp_megatron.runtime import atomic
from moepp_megatron.tools.planning.measured.compare import Range, error_range
from moepp_megatron.tools.planning.memory import GIB, fullest_rows
from moepp_megatron.tools.planning.plan import Plan, Planned
from moepp_megatron.tools.planning.traffic import placement, rows_with_room
from moepp_megatron.tools.planning.workload import Workload
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.terminal import print_uncut, titled_table

# Parts of a step's time, and the names in `StepTime.seconds` that each adds up.
_PARTS = {
    "FFN experts": ("experts", "shared_expert", "dense_ffn"),
    "attention": ("attention",),
    "router, permutation, zero-computation, norms": (
        *("router", "permutation", "zero_computation", "norms"),
    ),
    "embedding, output layer, loss": ("output",),
    "recomputation": ("recomputation",),
    "expert exchange, exposed": ("expert exchange", "sizes of the exchange"),
    "tensor and context parallel": ("tensor parallel", "context parallel"),
    "waiting for the host": ("waiting for the host",),
    "pipeline: bubble and transfers": ("pipeline bubble", "pipeline transfers"),
    "data parallel, optimizer": ("data parallel", "optimizer"),
}


def print_plan(plan: Plan, tokens: float, price: float | None) -> None:
    """Print the best layouts, and a comparison of the models."""
    hardware = plan.machine.hardware
    print_uncut(
        f"{plan.search.legal:,} legal layouts on {plan.world:,} {hardware.name}, "
        f"{plan.search.legal - plan.search.too_large:,} of them fit "
        f"{plan.machine.usable_bytes / GIB:.1f} GiB"
    )
    print_uncut(_layouts(plan))
    for number, planned in enumerate(plan.layouts, start=1):
        print_uncut(f"{number}  {_explain(plan, planned)}")
    if plan.best is None:
        return
    print_uncut("")
    errors = error_range(plan.config, plan.machine)
    print_uncut(_models_table(plan, tokens, price, errors))
    load = plan.best.step.load
    if load.mean > 1:
        print_uncut(
            f"fullest rank over mean, in a layer: {load.mean:.2f} on average, which times hold, "
            f"above {load.p99:.2f} in one of 100, which memory holds"
        )
    for line in _static_rows(plan, plan.best):
        print_uncut(line)
    print_uncut(_how_well(errors))


def _layouts(plan: Plan) -> Table:
    names = ("", "TP", "CP", "PP", "VPP", "EP", "ETP", "DP", "MBS")
    table = titled_table("layouts, best first", *names)
    table.add_column("recompute, bf16 states, overlap, dispatcher")
    for name in ("GiB", "step s", "tok/s/GPU", "TFLOP/s", "MFU", "a2a"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, planned in enumerate(plan.layouts, start=1):
        grid = planned.grid
        degrees = (grid.tp, grid.cp, grid.pp, grid.vpp, grid.ep, grid.etp, grid.dp)
        others = _extras(planned)
        if grid.ep > 1 and grid.dispatcher is not None:
            others.append(grid.dispatcher)
        table.add_row(
            str(number) if planned.fits else "no",
            *(str(degree) for degree in degrees),
            str(grid.micro_batch),
            ", ".join(others) or "-",
            f"{planned.memory_gib:.1f}",
            f"{planned.step.total:.3f}",
            f"{planned.tokens_per_s_per_gpu:,.0f}",
            f"{planned.tflops_per_gpu:.0f}",
            f"{planned.mfu:.1%}",
            _size_words(planned.step.exchange_bytes),
        )
    return table


def _explain(plan: Plan, planned: Planned) -> str:
    """One line on a layout: its time by parts, the links of its exchange, how much slower it is."""
    if not planned.fits:
        over = planned.memory_gib - plan.machine.usable_bytes / GIB
        return f"does not fit: {over:.1f} GiB too many on the fullest rank"
    step = planned.step
    shares = {name: seconds / step.total for name, seconds in _parts(step.seconds).items()}
    largest = sorted(shares.items(), key=lambda item: -item[1])[:3]
    text = ", ".join(f"{name} {share:.0%}" for name, share in largest)
    place = placement(planned.grid, "ep", plan.machine.per_node)
    if place.size == 1:
        text += "; no token travels"
    elif place.nodes == 1:
        text += "; tokens travel only by NVLink"
    else:
        text += f"; tokens travel over {place.nodes} nodes"
    best = plan.best
    if best is None or planned is best:
        return text
    slower = step.total / best.step.total - 1
    if slower < 0:
        return f"{slower:.1%}, within the model's error, and less simple than 1; {text}"
    return f"+{slower:.1%}; {text}"


def _parts(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by `_PARTS`, which cover the whole time."""
    known = {name for names in _PARTS.values() for name in names}
    assert known >= seconds.keys(), f"no part for {seconds.keys() - known}"
    return {part: sum(seconds.get(name, 0.0) for name in names) for part, names in _PARTS.items()}


def write_json(path: Path, plan: Plan, tokens: float, price: float | None) -> None:
    """Write a list of layouts, those that fit first, then by step time.

    The record of the plan, which `--out` writes, has `plan: true`.
    """
    layers = plan.config.model.num_layers
    shown = [*plan.layouts, *plan.baselines]
    if plan.fastest and all(plan.fastest.grid != layout.grid for layout in plan.layouts):
        shown.append(plan.fastest)
    errors = error_range(plan.config, plan.machine)
    records = []
    for planned in sorted(shown, key=lambda layout: (not layout.fits, layout.step.total)):
        record = planned.record(layers)
        record["plan"] = planned is plan.best
        days = planned.run_seconds(tokens) / 86400
        money = None if price is None else 24 * days * plan.world * price
        record["run"] = {"tokens": tokens, "days": days, "money": money}
        record["step_time_range_s"] = errors and errors.of(planned.step.total)
        records.append(record)
    atomic.write_json(path, records)


def _models_table(plan: Plan, tokens: float, price: float | None, errors: Range | None) -> Table:
    """Speed of each model in its fastest layout and in vanilla's, and days and money of its run."""
    title = "MoE++ and vanilla, each in its fastest layout, and in vanilla's"
    run = f"days for {formatting.big_count(tokens)} tokens"
    names = ["phi", "step s", "range", "speed-up", "in vanilla's", "tok/s/GPU", "a2a", run]
    names += [] if price is None else ["money"]
    table = titled_table(title, "model", *names, words=1)
    table.add_column("layout")
    shown = _models(plan)
    base = next((planned for planned in shown if planned.kind == "vanilla"), shown[0])
    for planned in shown:
        days, shared_s = planned.run_seconds(tokens) / 86400, planned.shared_step_s
        table.add_row(
            _model_name(planned),
            f"{planned.ffn_share:.3f}",
            f"{planned.step.total:.3f}",
            _step_range(planned, errors),
            f"{base.step.total / planned.step.total:.2f}",
            "-" if shared_s is None else f"{base.step.total / shared_s:.2f}",
            f"{planned.tokens_per_s_per_gpu:,.0f}",
            _size_words(planned.step.exchange_bytes),
            f"{days:,.1f}",
            *([] if price is None else [f"{24 * days * plan.world * price:,.0f}"]),
            ", ".join([_short_name(planned), *_extras(planned)]),
        )
    return table


def _extras(planned: Planned) -> list[str]:
    """List a layout's choices besides degrees: recomputation, bf16 states and overlap."""
    grid = planned.grid
    found = [*grid.recompute, *(f"{state} bf16" for state in grid.states)]
    return found + (["a2a overlap"] if grid.expert_overlap else [])


def _static_rows(plan: Plan, best: Planned) -> Iterator[str]:
    """Compare the buffer of static rows with what experts need."""
    factor, load = plan.config.moe.static_rows, Workload.from_config(plan.config)
    if factor is None:
        return
    mean = fullest_rows(load, best.grid)
    rows = rows_with_room(load, best.grid, mean)
    yield (
        f"moe.static_rows ({factor:g}): {rows:,.0f} rows a micro-batch are moved, sent and kept, "
        f"{mean:,.0f} needed on average; the fullest rank needs {best.step.load.p99:.2f} times "
        "the average in one of 100 layers, and a step in which one overflows runs twice"
    )


def _step_range(planned: Planned, errors: Range | None) -> str:
    if errors is None:
        return "-"
    low, high = errors.of(planned.step.total)
    return f"{low:.3f} to {high:.3f}"


def _model_name(planned: Planned) -> str:
    """The model in words."""
    name = "vanilla" if planned.tau is None else f"MoE++ tau {planned.tau:g}"
    return name if planned.fits else f"{name} (does not fit)"


def _how_well(errors: Range | None) -> str:
    """Say how far estimates were off."""
    if errors is None:
        return "estimates: docs/planning.md says how well they hold"
    found = errors.errors
    whose = f"{found.rows} published runs ({errors.family}) that set no number of the model"
    other = "" if errors.is_own else "; there are too few of this GPU"
    return (
        f"estimates, off by {found.median:.0%} in the median of {whose}{other}. Ranges hold eight "
        "in ten of them; days are those of steps"
    )


def _size_words(count: float) -> str:
    """Format bytes as GB or TB."""
    if count >= 10e12:
        return f"{count / 1e12:,.0f} TB"
    return f"{count / 1e9:,.0f} GB" if count else "0"


def _models(plan: Plan) -> list[Planned]:
    """Each model in its fastest layout: vanilla first, then by tau."""
    fastest = [plan.fastest] if plan.fastest else []
    return sorted([*plan.baselines, *fastest], key=lambda m: (m.tau is not None, -(m.tau or 0)))


def _short_name(planned: Planned) -> str:
    """A layout's degrees above 1, such as TP2 PP8 EP64 MBS1."""
    grid = planned.grid
    replicas = [f"DP{grid.dp}"] if grid.dp > 1 else []
    return " ".join([*grid.splits, *replicas, f"MBS{grid.micro_batch}"])
