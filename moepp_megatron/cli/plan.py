"""`moepp plan`: layouts, memory, step time, traffic and money before a cluster is booked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from moepp_megatron.cli.echo import echo
from moepp_megatron.cli.options import (
    GpuOption,
    JsonOption,
    OverridesArgument,
    PriceOption,
    TokensOption,
)
from moepp_megatron.cli.planned import planned_samples
from moepp_megatron.config import Config, ConfigError, load_config

if TYPE_CHECKING:
    from moepp_megatron.tools.planning.plan import Plan


# What `--measured` uses; all else says what rows say themselves.
_WITH_ROWS = ("measured", "json_file")


def plan(
    context: typer.Context,
    config: Annotated[
        Path | None,
        Argument(
            help="Read this YAML configuration; leave it out with --measured.", metavar="CONFIG"
        ),
    ] = None,
    overrides: OverridesArgument = None,
    gpus: Annotated[int, Option(min=1, help="Plan for this many GPUs.")] = 8,
    gpu: GpuOption = "h100_sxm",
    taus: Annotated[
        str,
        Option(help="Also estimate the model with these values of moe.tau.", metavar="TAU,..."),
    ] = "0.25,0.5,1.0",
    price: PriceOption = None,
    tokens: TokensOption = None,
    top: Annotated[int, Option(min=1, max=50, help="Show this many layouts.")] = 5,
    json_file: JsonOption = None,
    out: Annotated[
        Path | None,
        Option(
            help="Write the best layout to this file, a configuration whose base is CONFIG.",
            metavar="FILE.yaml",
        ),
    ] = None,
    measured: Annotated[
        list[Path] | None,
        Option(
            help="Compare the estimates with the measured runs that these files list.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Search every legal layout of CONFIG's model on a number of GPUs.

    Nothing is run: a cost model makes the estimates, and docs/planning.md has its errors.
    With --measured instead of CONFIG, predicted is shown next to measured, with errors by family.

    Examples:
        moepp plan configs/models/moepp_7b_16_4.yaml --gpus 64 --gpu h100
        moepp plan configs/models/moepp_2b_32_8.yaml --price 2.5 --out plan.yaml
    """
    from moepp_megatron.config.choices import parse_numbers

    if measured:
        ignored = list(_ignored_options(context))
        if ignored:
            raise ConfigError(
                f"--measured ({measured[0]}) must come without {', '.join(ignored)}: rows say what "
                "ran; leave this out"
            )
        _hold_to_runs(measured, json_file)
        return
    if config is None:
        raise ConfigError("CONFIG must be given, or --measured FILE; name a YAML configuration")
    settings = load_config(config, overrides or [])
    tau_values = parse_numbers("--taus", taus, "a number > 0", lambda tau: 0 < tau <= 10)
    for name, value in (("--price", price), ("--tokens", tokens)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{name} ({value:g}) must be a number above 0; use for example 2.5")
    from moepp_megatron.tools.planning.plan import plan as search
    from moepp_megatron.tools.report import plan as report

    result = search(settings, gpus=gpus, gpu=gpu, taus=tau_values, top=top)
    tokens = tokens or planned_samples(settings) * settings.model.seq_length
    price = price or result.machine.hardware.price_per_hour
    report.print_plan(result, tokens, price)
    if json_file is not None:
        report.write_json(json_file, result, tokens, price)
        echo(f"layouts      {json_file}")
    _require_fit(result)
    if out is not None:
        _write_layout(out, result, config, overrides or [])
        echo(f"layout       {out}")


def _ignored_options(context: typer.Context) -> Iterator[str]:
    """Arguments and options of the command line that `--measured` would ignore."""
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and name not in _WITH_ROWS:
            yield parameter.opts[0] if parameter.opts[0].startswith("-") else name.upper()


def _hold_to_runs(measured: list[Path], json_file: Path | None) -> None:
    """Print predicted and measured for files of rows."""
    from moepp_megatron.runtime.atomic import write_json
    from moepp_megatron.tools.planning.measured.compare import compare
    from moepp_megatron.tools.planning.measured.rows import read_runs
    from moepp_megatron.tools.report import measured as report

    comparisons = [compare(run) for file in measured for run in read_runs(file)]
    report.print_measured(comparisons)
    if json_file is not None:
        write_json(json_file, [comparison.record() for comparison in comparisons])
        echo(f"rows         {json_file}")


def _require_fit(result: Plan) -> None:
    """Refuse a plan without a layout that fits."""
    if result.best is not None:
        return
    need = min(memory for memory, _ in result.search.misses)
    raise ConfigError(
        f"--gpus ({result.world}) must be enough for the model: the smallest layout needs "
        f"{need / 2**30:.1f} GiB of {result.machine.usable_bytes / 2**30:.1f} on its fullest rank; "
        "use more GPUs or a GPU with more memory"
    )


def _write_layout(out: Path, result: Plan, config: Path, overrides: list[str]) -> None:
    from moepp_megatron.config.load import overriding_sections
    from moepp_megatron.runtime.atomic import write_result
    from moepp_megatron.tools.planning.overlay import overlay_text

    best = result.best
    assert best is not None, "a layout that fits was required"
    comment = (
        f"Planned for {result.world} {result.machine.hardware.name}: {best.step.total:.3f} s per "
        f"step, {best.memory_gib:.1f} GiB per GPU (estimates)."
    )
    layers = result.config.model.num_layers
    changes = overriding_sections(overrides)
    text = overlay_text(best.grid, layers, config, out, changes, comment)
    write_result(out, text.encode())
    _check(out, result)


def _check(out: Path, result: Plan) -> None:
    """Check that the written file is a valid configuration for these GPUs."""
    from moepp_megatron.config import Layout

    written: Config = load_config(out)
    Layout.from_config(written, result.world)
