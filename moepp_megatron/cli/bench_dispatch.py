"""`moepp bench dispatch`: what dispatch and combine send, and how long they take."""

from __future__ import annotations

from typing import Annotated

import typer

from moepp_megatron.cli.echo import echo
from moepp_megatron.cli.options import DtypeOption, JsonOption, NprocOption
from moepp_megatron.cli.ranks import start_ranks


def dispatch(
    nproc: NprocOption = 2,
    tokens: Annotated[
        int, typer.Option(min=1, help="Send this many tokens from each rank.", metavar="TOKENS")
    ] = 2048,
    hidden_size: Annotated[int, typer.Option(min=1, help="Send tokens of this hidden size.")] = 768,
    experts: Annotated[
        int, typer.Option(min=1, help="Spread this many FFN experts over the ranks.")
    ] = 8,
    topk: Annotated[int, typer.Option(min=1, help="Select this many experts per token.")] = 2,
    phi: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Let FFN experts have this share of all selections."),
    ] = 0.6,
    dtype: DtypeOption = "fp32",
    rounds: Annotated[
        int, typer.Option(min=1, help="Time this many rounds; the dispatchers take turns.")
    ] = 20,
    json_file: JsonOption = None,
) -> None:
    """Measure bytes and time of dispatch and combine: vanilla, FFN-only, deduplicated.

    All ranks form one expert-parallel group.

    Examples:
        moepp bench dispatch --nproc 2
        moepp bench dispatch --nproc 4 --experts 16 --topk 4 --json dispatch.json
    """
    from moepp_megatron.config.choices import parse_choices
    from moepp_megatron.config.errors import ConfigError
    from moepp_megatron.runtime.rank import RankEnvironment

    rank = RankEnvironment.read()
    ranks = rank.world_size if rank.is_launched else nproc
    (chosen_dtype,) = parse_choices("--dtype", dtype, ("fp32", "bf16"))
    if experts % ranks != 0:
        raise ConfigError(
            f"--experts ({experts}) must be divisible by the number of ranks ({ranks}); "
            f"use {(experts // ranks + 1) * ranks}"
        )
    if topk > experts:
        raise ConfigError(f"--topk ({topk}) must be at most --experts ({experts}); use {experts}")
    if not rank.is_launched:
        arguments = ["bench", "dispatch", "--tokens", str(tokens), "--phi", str(phi)]
        arguments += ["--hidden-size", str(hidden_size), "--experts", str(experts)]
        arguments += ["--topk", str(topk), "--dtype", dtype, "--rounds", str(rounds)]
        arguments += [] if json_file is None else ["--json", str(json_file)]
        start_ranks(nproc, arguments)
        return
    from moepp_megatron.runtime.quiet import quiet

    quiet()
    from moepp_megatron.runtime import distributed
    from moepp_megatron.workbench.bench.dispatch import DispatchSetting, run_dispatch_benchmark
    from moepp_megatron.workbench.report import bench

    setting = DispatchSetting(tokens, hidden_size, experts, topk, phi, chosen_dtype)
    with distributed.joined(rank):
        results = run_dispatch_benchmark(setting, rounds)
    if rank.rank == 0:
        bench.print_dispatch(setting, results)
        if json_file is not None:
            bench.write_records(json_file, results)
            echo(f"results      {json_file}")
