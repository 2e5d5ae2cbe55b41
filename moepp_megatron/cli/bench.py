"""`moepp bench`: speed against megatron-core's vanilla layer in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure speed against the vanilla layer.", no_args_is_help=True)

_DTYPES = ("fp32", "bf16")


@app.command()
def layer(
    shapes: Annotated[
        str, typer.Option(help="Models of the paper: 0.6B, 1B, 2B, 7B.", metavar="NAME,...")
    ] = "0.6B,1B",
    taus: Annotated[
        str, typer.Option(help="Weights of a zero-computation expert.", metavar="TAU,...")
    ] = "0.1,0.25,0.5,0.75,1.0",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a pass.")] = 4096,
    passes: Annotated[
        str, typer.Option(help="forward, forward_backward.", metavar="PASS,...")
    ] = "forward,forward_backward",
    rounds: Annotated[
        int, typer.Option(min=1, help="Times each layer runs; the layers take turns.")
    ] = 9,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results here.", metavar="FILE")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw them, with the paper's, here.", metavar="FILE.png")
    ] = None,
) -> None:
    """One MoE++ layer against megatron-core's MoE layer of the same FFN experts.

    Routing is held at the balanced share phi. efficiency = speedup x phi: how much of the speed-up
    that the routing allows is reached.
    """
    from moepp_megatron.config.choices import parse_choices, parse_numbers

    tau_values = parse_numbers("--taus", taus, "a number > 0", lambda tau: tau > 0)
    pass_names = parse_choices("--passes", passes, ("forward", "forward_backward"))
    (chosen_dtype,) = parse_choices("--dtype", dtype, _DTYPES)
    from moepp_megatron.bench.shapes import SHAPES

    shape_names = parse_choices("--shapes", shapes, tuple(SHAPES))
    from moepp_megatron.runtime.quiet import quiet

    quiet()
    from moepp_megatron.bench.layer import run_layer_benchmark
    from moepp_megatron.bench.process import single_process
    from moepp_megatron.report import bench

    total = len(shape_names) * len(tau_values) * len(pass_names)
    with single_process(), bench.progress(total) as advance:
        results = list(
            run_layer_benchmark(
                [SHAPES[name] for name in shape_names],
                tau_values,
                chosen_dtype,
                tokens,
                pass_names,
                rounds,
                progress=advance,
            )
        )
    bench.print_table(results)
    if json_file is not None:
        bench.write_json(json_file, results)
        typer.echo(f"results      {json_file}")
    if plot is not None:
        bench.plot(plot, results)
        typer.echo(f"plot         {plot}")
