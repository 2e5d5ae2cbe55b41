"""`moepp convert`: checkpoints in and out."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moepp_megatron.cli.echo import echo
from moepp_megatron.layer_settings import LayerSettings

app = typer.Typer(help="Convert checkpoints.", no_args_is_help=True)


class Dtype(StrEnum):
    """Dtypes of weights."""

    fp32 = "fp32"
    bf16 = "bf16"


class ExportLayout(StrEnum):
    """Layouts of an exported folder."""

    moepp = "moepp"
    released = "released"
    longcat = "longcat"
    longcat_transformers = "longcat-transformers"
    zeda = "zeda"


Source = Annotated[Path, typer.Argument(help="What to convert.", metavar="SRC")]
Target = Annotated[Path, typer.Argument(help="Folder to make.", metavar="DST")]
ChosenDtype = Annotated[
    Dtype | None, typer.Option(help="Convert all weights; by default each keeps its own.")
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle", help="Accept .bin files too (read as weights only); trust the source."
    ),
]


@app.command("hf-to-mcore")
def hf_to_mcore(
    source: Source, target: Target, dtype: ChosenDtype = None, allow_pickle: AllowPickle = False
) -> None:
    """A MoE++ checkpoint in Hugging Face format to one that `train`, `score`, `generate` load."""
    _quiet()
    from moepp_megatron.interop.to_mcore import hf_to_mcore as convert

    convert(source, target, dtype, allow_pickle)
    echo(f"checkpoint   {target}")


@app.command("mcore-to-hf")
def mcore_to_hf(
    source: Source,
    target: Target,
    layout: Annotated[
        ExportLayout,
        typer.Option(
            help="moepp: our class names, any model; released: the released MoE++ model's; "
            "longcat: LongCat-Flash for vLLM and sglang; longcat-transformers: the same for "
            "transformers 5; zeda: Qwen3-MoE with zero experts."
        ),
    ] = ExportLayout.moepp,
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest shard, GB.")] = 5.0,
    dtype: ChosenDtype = None,
    license_id: Annotated[
        str,
        typer.Option(
            "--license", help="The weights' licence for the model card, such as apache-2.0."
        ),
    ] = "unknown",
) -> None:
    """A checkpoint or a run to a folder that transformers loads with trust_remote_code."""
    _quiet()
    from moepp_megatron.interop.to_hf import mcore_to_hf as convert

    shard_bytes, chosen = int(max_shard_gb * 1e9), None if dtype is None else dtype.value
    for warning in convert(
        source, target, layout.value, shard_bytes, dtype=chosen, license_id=license_id
    ):
        echo(f"warning: {warning}", err=True)
    echo(f"model        {target}")


@app.command("upcycle")
def upcycle(
    source: Source,
    target: Target,
    zero: Annotated[
        int, typer.Option(min=0, help="Zero experts to add.")
    ] = LayerSettings.num_zero_experts,
    copy: Annotated[
        int, typer.Option(min=0, help="Copy experts to add.")
    ] = LayerSettings.num_copy_experts,
    constant: Annotated[
        int, typer.Option(min=0, help="Constant experts to add.")
    ] = LayerSettings.num_constant_experts,
    gating_residual: Annotated[bool, typer.Option(help="Add gating residuals, 0 at first.")] = True,
    tau: Annotated[
        float, typer.Option(min=0.001, help="moe.tau of the new model.")
    ] = LayerSettings.tau,
    experts: Annotated[int, typer.Option(min=1, help="Of a dense model: FFN experts.")] = 8,
    topk: Annotated[int, typer.Option(min=1, help="Of a dense model: experts per token.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of what is new.")] = 1234,
    approximate: Annotated[
        bool,
        typer.Option(
            "--approximate", help="Take gates that shrink a little too (norm_topk_prob false)."
        ),
    ] = False,
    dtype: ChosenDtype = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """A checkpoint of another model to a MoE++ one that computes the same.

    Llama, Qwen3, Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V3 (without groups of experts).
    """
    _quiet()
    from moepp_megatron.interop.upcycle import Additions, least_gate
    from moepp_megatron.interop.upcycle import upcycle as convert

    additions = Additions(
        num_zero_experts=zero,
        num_copy_experts=copy,
        num_constant_experts=constant,
        gating_residual=gating_residual,
        tau=tau,
        num_ffn_experts=experts,
        router_topk=topk,
        seed=seed,
        approximate=approximate,
    )
    config = convert(source, target, additions, dtype, allow_pickle)
    echo(f"checkpoint   {target}")
    least = least_gate(config)
    if least < 1.0:
        echo(f"gates        at least {least:.3f} of what they were, for --approximate")
    if config.moe.num_zero_computation_experts:
        echo(
            f"FFN share    1 now; the first steps of training move it to phi "
            f"({config.moe.ffn_share:.3f}), or a ramp of moe.budget: docs/how_to/upcycle.md"
        )


@app.command("megatron-lm")
def megatron_lm(
    source: Annotated[
        Path,
        typer.Argument(help="A --save folder of Megatron-LM (its newest), or one iter_* folder."),
    ],
    target: Target,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The tokenizer.json that the run's data were made with.")
    ] = None,
    moepp_args: Annotated[
        str | None,
        typer.Option(
            help="The run's MOEPP_ARGS; needed where the checkpoint does not keep its settings."
        ),
    ] = None,
) -> None:
    """A checkpoint of Megatron-LM's own loop to one of ours: score, generate, inspect, export it.

    The weights are not copied where the file system has hard links.
    """
    _quiet()
    from moepp_megatron.interop.from_megatron_lm import from_megatron_lm

    config = from_megatron_lm(source, target, moepp_args, tokenizer)
    echo(f"checkpoint   {target}")
    echo(
        f"model        {config.model.num_layers} layers, {config.moe.num_ffn_experts} FFN experts "
        f"and {config.moe.num_experts - config.moe.num_ffn_experts} others a layer"
    )
    if tokenizer is None:
        echo("tokenizer    none; generate and inspect need one: --tokenizer FILE")


@app.command("to-megatron-lm")
def to_megatron_lm(source: Source, target: Target) -> None:
    """A checkpoint or a run to one that Megatron-LM's loop loads with --load: the weights alone."""
    _quiet()
    from moepp_megatron.interop.to_megatron_lm import ARGUMENTS_FILE
    from moepp_megatron.interop.to_megatron_lm import to_megatron_lm as convert

    arguments = convert(source, target)
    echo(f"checkpoint   {target}")
    echo(f"arguments    {target / ARGUMENTS_FILE}: {arguments}")


def _quiet() -> None:
    from moepp_megatron.runtime.quiet import quiet

    quiet()
