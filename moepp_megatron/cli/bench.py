"""`moepp bench`: speed against megatron-core's vanilla layer in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from moepp_megatron.cli.echo import echo, warn
from moepp_megatron.cli.options import ConfigArgument, JsonOption, NprocOption, OverridesArgument
from moepp_megatron.cli.ranks import option_words, start_ranks
from moepp_megatron.layer_settings import Fused

if TYPE_CHECKING:
    from moepp_megatron.config import Config, Layout

app = typer.Typer(
    help="""Measure speed against the vanilla layer.

    Examples:
        moepp bench layer --shapes 0.6B --json layer.json
        moepp bench step configs/quickstart.yaml --nproc 2
    """,
    no_args_is_help=True,
)

_DTYPES = ("fp32", "bf16")
_LAYER_DTYPES = (*_DTYPES, "fp8")
_FP8_RECIPES = ("delayed", "tensorwise", "blockwise")
_FUSED: dict[str, Fused] = {"auto": "auto", "true": True, "false": False}


@app.command("layer")
def _layer(
    shapes: Annotated[
        str,
        Option(
            help="Measure the layers of these models of the paper: 0.6B, 1B, 2B, 7B.",
            metavar="NAME,...",
        ),
    ] = "0.6B,1B",
    taus: Annotated[
        str, Option(help="Measure with these values of moe.tau.", metavar="TAU,...")
    ] = "0.1,0.25,0.5,0.75,1.0",
    dtype: Annotated[
        str,
        Option(
            help="Compute in this dtype; with fp8, the experts' products are in FP8 and all else "
            "is in bf16.",
            metavar="fp32|bf16|fp8",
        ),
    ] = "fp32",
    fp8_recipe: Annotated[
        str,
        Option(help="Scale in this way with fp8.", metavar="delayed|tensorwise|blockwise"),
    ] = "delayed",
    fused: Annotated[
        str,
        Option(
            help="Compute the MoE++ layer with Triton kernels or without.",
            metavar="auto|true|false",
        ),
    ] = "auto",
    constants: Annotated[
        int | None,
        Option(
            min=1, help="Use this many constant experts in place of the shape's own.", metavar="N"
        ),
    ] = None,
    tokens: Annotated[
        int, Option(min=1, help="Compute this many tokens per pass.", metavar="TOKENS")
    ] = 4096,
    passes: Annotated[
        str, Option(help="Time these passes: forward, forward_backward.", metavar="PASS,...")
    ] = "forward,forward_backward",
    rounds: Annotated[
        int, Option(min=1, help="Run each layer this many times; the layers take turns.")
    ] = 9,
    json_file: JsonOption = None,
) -> None:
    """Time one MoE++ layer against megatron-core's MoE layer of the same FFN experts.

    Routing is held at the balanced share phi. efficiency = speedup x phi: how much of the speed-up
    that the routing allows is reached. Each part's time is shown with its bound: its bytes over
    the measured copy, or its FLOPs over the measured matrix product of this GPU.

    Examples:
        moepp bench layer --shapes 0.6B --taus 0.25,0.75 --tokens 1024
        moepp bench layer --dtype bf16 --json layer.json
    """
    from moepp_megatron.config.choices import parse_choices, parse_numbers

    tau_values = parse_numbers("--taus", taus, "a number > 0", lambda tau: tau > 0)
    pass_names = parse_choices("--passes", passes, ("forward", "forward_backward"))
    (chosen_dtype,) = parse_choices("--dtype", dtype, _LAYER_DTYPES)
    (recipe,) = parse_choices("--fp8-recipe", fp8_recipe, _FP8_RECIPES)
    (fused_name,) = parse_choices("--fused", fused, tuple(_FUSED))
    from moepp_megatron.tools.bench.shapes import SHAPES

    shape_names = parse_choices("--shapes", shapes, tuple(SHAPES))
    chosen = [SHAPES[name] for name in shape_names]
    if constants is not None:
        chosen = [shape.with_constants(constants) for shape in chosen]
    from moepp_megatron.runtime.optional import quiet

    quiet()
    if chosen_dtype == "fp8":
        _refuse_unfit_fp8(recipe)
    from moepp_megatron.runtime.atomic import write_json
    from moepp_megatron.tools.bench.contestants import single_process
    from moepp_megatron.tools.bench.layer import run_layer_benchmark
    from moepp_megatron.tools.report import bench
    from moepp_megatron.tools.report.terminal import progress

    total = len(shape_names) * len(tau_values) * len(pass_names)
    with single_process(), progress(total) as advance:
        results = list(
            run_layer_benchmark(
                chosen,
                tau_values,
                pass_names,
                dtype=chosen_dtype,
                tokens=tokens,
                rounds=rounds,
                fp8_recipe=recipe,
                fused=_FUSED[fused_name],
                progress=advance,
            )
        )
    bench.print_layers(results)
    if json_file is not None:
        write_json(json_file, results)
        echo(f"results      {json_file}")


def _refuse_unfit_fp8(recipe: str) -> None:
    from moepp_megatron.config import UnfitError
    from moepp_megatron.runtime.fit import FP8Machine
    from moepp_megatron.tools.bench.contestants import layer_config
    from moepp_megatron.tools.bench.shapes import SHAPES

    config = layer_config(SHAPES["0.6B"], 0.75, "fp8", False, recipe)
    obstacle = FP8Machine.this().obstacle(config)
    if obstacle is not None:
        reason, _, _ = obstacle.partition("; ")
        raise UnfitError(f"--dtype (fp8) cannot be measured here: {reason}; use bf16")


@app.command("step")
def _step(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    nproc: NprocOption = 1,
    rounds: Annotated[
        int, Option(min=1, help="Time this many steps per model; the models take turns.")
    ] = 9,
    json_file: JsonOption = None,
) -> None:
    """Time training steps of CONFIG's model and of its vanilla baseline, on random tokens.

    Routing is held at the balanced share phi, so the result does not depend on training.

    Examples:
        moepp bench step configs/quickstart.yaml --nproc 2 --rounds 5
        moepp bench step configs/quickstart.yaml --nproc 2 --json step.json
    """
    from moepp_megatron.config import Layout, check_config, check_world_size, load_config
    from moepp_megatron.config.vanilla import refuse_vanilla
    from moepp_megatron.runtime.rank import RankEnvironment

    rank = RankEnvironment.read()
    settings = load_config(config, overrides or [])
    refuse_vanilla(settings)
    world_size = rank.world_size if rank.is_launched else nproc
    layout = Layout.from_config(settings, world_size)
    if rank.rank == 0:
        warn(*check_config(settings), *check_world_size(settings, world_size))
    from moepp_megatron.runtime.fit import check_fit

    check_fit(settings)
    if not rank.is_launched and nproc > 1:
        options = option_words(rounds=rounds, json=json_file)
        start_ranks(nproc, ["bench", "step", *options, str(config), *(overrides or [])])
        return
    _step_on_rank(settings, layout, rounds, json_file)


def _step_on_rank(config: Config, layout: Layout, rounds: int, json_file: Path | None) -> None:
    from moepp_megatron.runtime.optional import quiet

    quiet()
    from moepp_megatron.runtime import distributed
    from moepp_megatron.runtime.atomic import write_json
    from moepp_megatron.runtime.rank import RankEnvironment
    from moepp_megatron.tools.bench.step import run_step_benchmark
    from moepp_megatron.tools.report import bench

    rank = RankEnvironment.read()
    with distributed.initialized(rank):
        distributed.build_groups(config, layout)
        result = run_step_benchmark(config, layout, rounds)
    if rank.rank != 0:
        return
    bench.print_step(result)
    if json_file is not None:
        write_json(json_file, result)
        echo(f"result       {json_file}")
