"""`moepp bench collectives`: the network's bandwidth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moepp_megatron.cli.echo import echo
from moepp_megatron.cli.options import DtypeOption, JsonOption, NprocOption
from moepp_megatron.cli.ranks import start_ranks
from moepp_megatron.config import ConfigError

# The keys of `bench.collective_cases.KINDS`, which imports torch.
_KINDS = (
    "all_to_all",
    "all_to_all_uneven",
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "send_receive",
)


def collectives(
    nproc: NprocOption = 2,
    smallest: Annotated[
        str,
        typer.Option("--min", help="Begin with this size; K, M and G are binary.", metavar="BYTES"),
    ] = "1K",
    largest: Annotated[
        str, typer.Option("--max", help="End with this size at the latest.", metavar="BYTES")
    ] = "16M",
    factor: Annotated[
        int, typer.Option(min=2, help="Multiply the size by this from one case to the next.")
    ] = 4,
    operations: Annotated[
        str,
        typer.Option(
            help="Measure these: all_to_all, all_to_all_uneven, all_reduce, all_gather, "
            "reduce_scatter, send_receive, or all.",
            metavar="NAME,...",
        ),
    ] = "all",
    groups: Annotated[
        str | None,
        typer.Option(
            help="Measure in groups of these numbers of ranks; by default, of 2, 4, ... and all.",
            metavar="N,...",
        ),
    ] = None,
    dtype: DtypeOption = "fp32",
    warmup: Annotated[
        int, typer.Option(min=1, help="Make this many calls of each case before timing starts.")
    ] = 2,
    iterations: Annotated[
        int, typer.Option(min=1, help="Time this many calls per repetition.")
    ] = 5,
    repeats: Annotated[
        int,
        typer.Option(
            min=1, help="Repeat this many times; the cases take turns, and medians count."
        ),
    ] = 5,
    json_file: JsonOption = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the bus bandwidth to this file.", metavar="FILE.png"),
    ] = None,
) -> None:
    """Measure collectives alone, over sizes and groups, and check the data, like nccl-tests.

    CPU ranks use gloo and GPUs NCCL. `moepp profile` takes the FILE of --json as its --ceiling.

    Examples:
        moepp bench collectives --nproc 2 --json collectives.json
        moepp bench collectives --nproc 4 --operations all_to_all --max 1M
    """
    from moepp_megatron.config.choices import parse_choices, parse_counts, parse_size
    from moepp_megatron.runtime.rank import RankEnvironment

    rank = RankEnvironment.read()
    ranks = rank.world_size if rank.is_launched else nproc
    low, high = parse_size("--min", smallest), parse_size("--max", largest)
    if low > high:
        raise ConfigError(f"--min ({smallest}) must be at most --max ({largest}); use {largest}")
    if ranks < 2:
        raise ConfigError(f"--nproc ({ranks}) must be at least 2 to have a network; use 2")
    (chosen_dtype,) = parse_choices("--dtype", dtype, ("fp32", "bf16"))
    names = _operations(operations)
    group_sizes = parse_counts("--groups", groups) if groups is not None else None
    for size in group_sizes or []:
        if size < 2 or ranks % size:
            raise ConfigError(
                f"--groups ({size}) must be at least 2 and divide the number of ranks ({ranks}); "
                f"use {ranks}"
            )
    for option, file in (("--json", json_file), ("--plot", plot)):
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(f"{option} ({file}) must lie in a folder that exists; make it first")
    if not rank.is_launched:
        arguments = ["--min", smallest, "--max", largest, "--factor", str(factor)]
        arguments += ["--operations", ",".join(names), "--dtype", dtype]
        arguments += ["--warmup", str(warmup), "--iterations", str(iterations)]
        arguments += ["--repeats", str(repeats)]
        arguments += [] if groups is None else ["--groups", groups]
        arguments += [] if json_file is None else ["--json", str(json_file)]
        arguments += [] if plot is None else ["--plot", str(plot)]
        start_ranks(nproc, ["bench", "collectives", *arguments])
        return
    from moepp_megatron.runtime.quiet import quiet

    quiet()
    from moepp_megatron.workbench.bench import collectives as bench

    setting = bench.CollectiveSetting(
        operations=names,
        sizes=bench.sizes_between(low, high, factor),
        group_sizes=group_sizes or bench.default_group_sizes(ranks),
        dtype=chosen_dtype,
        warmup=warmup,
        iterations=iterations,
        repeats=repeats,
    )
    _measure(setting, json_file, plot)


def _operations(text: str) -> list[str]:
    from moepp_megatron.config.choices import parse_choices

    return list(_KINDS) if text == "all" else parse_choices("--operations", text, _KINDS)


def _measure(setting: object, json_file: Path | None, plot: Path | None) -> None:
    """Be one rank; rank 0 prints and writes."""
    from contextlib import nullcontext

    from moepp_megatron.runtime import distributed
    from moepp_megatron.runtime.launch import leave
    from moepp_megatron.runtime.rank import RankEnvironment
    from moepp_megatron.workbench.bench.collectives import (
        CollectiveSetting,
        check_memory,
        run_collectives,
    )
    from moepp_megatron.workbench.report import bench, collectives
    from moepp_megatron.workbench.report.progress import progress

    assert isinstance(setting, CollectiveSetting)
    rank = RankEnvironment.read()
    first = rank.rank == 0
    with distributed.joined(rank) as device:
        check_memory(max(setting.sizes), rank.local_world_size, device.type)
        bar = progress(setting.repeats + 2) if first else nullcontext(lambda what: None)
        with bar as advance:
            results = run_collectives(setting, device, rank.local_world_size, advance)
    if first:
        collectives.print_tables(results)
        if json_file is not None:
            bench.write_records(json_file, results)
            echo(f"results      {json_file}")
        if plot is not None:
            collectives.plot(plot, results)
            echo(f"plot         {plot}")
    wrong = sum(result.wrong for result in results)
    if wrong:
        if first:
            echo(f"error: {wrong} elements arrived wrong; see the column 'wrong'", err=True)
        leave(1)
