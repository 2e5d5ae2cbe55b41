"""`moepp convert`: converts checkpoints from other formats and to them."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from moepp_megatron.cli.echo import echo, warn
from moepp_megatron.layer_settings import LayerSettings
from moepp_megatron.runtime.object_store import place

app = typer.Typer(
    help="""Convert checkpoints.

    Examples:
        moepp convert upcycle mixtral upcycled
        moepp convert mcore-to-hf runs/quickstart exported
    """,
    no_args_is_help=True,
)


class _Dtype(StrEnum):
    """Dtypes of weights."""

    fp32 = "fp32"
    bf16 = "bf16"


class _ExportLayout(StrEnum):
    """Layouts of an exported folder."""

    moepp = "moepp"
    released = "released"
    zeda = "zeda"
    vanilla = "vanilla"


Source = Annotated[Path, Argument(help="Convert the model in this folder.", metavar="SRC")]
OwnSource = Annotated[
    Path,
    Argument(
        help="Convert the model in this folder, or in s3://bucket/prefix.",
        metavar="SRC",
        parser=place,
    ),
]
Target = Annotated[
    Path,
    Argument(help="Write the result to this folder, which must be new or empty.", metavar="DST"),
]
ChosenDtype = Annotated[
    _Dtype | None,
    Option(help="Convert all weights to this dtype; by default, each keeps its own."),
]
AllowPickle = Annotated[
    bool,
    Option(
        "--allow-pickle",
        help="Accept .bin files too, which are read as weights only; use it if you trust SRC.",
    ),
]


@app.command("hf-to-mcore")
def _hf_to_mcore(
    source: Source, target: Target, dtype: ChosenDtype = None, allow_pickle: AllowPickle = False
) -> None:
    """Convert a MoE++ or ZEDA model in Hugging Face format to a checkpoint of ours.

    `train`, `score`, `generate` and `inspect` load it.

    Examples:
        moepp convert hf-to-mcore moepp_7b converted --dtype bf16
    """
    _begin(target)
    from moepp_megatron.interop.to_mcore import hf_to_mcore as convert

    convert(source, target, dtype, allow_pickle)
    echo(f"checkpoint   {target}")


@app.command("mcore-to-hf")
def _mcore_to_hf(
    source: OwnSource,
    target: Target,
    layout: Annotated[
        _ExportLayout,
        Option(
            help="Write the model in this form. moepp has our class names and takes any model "
            "without latent attention; released is that of the released MoE++ models; zeda is "
            "ZEDA's Qwen3-MoE; vanilla is Mixtral, Qwen3-MoE or DeepSeek-MoE, for llama.cpp."
        ),
    ] = _ExportLayout.moepp,
    max_shard_gb: Annotated[
        float, Option(min=0.001, help="Write files of at most this many GB.", metavar="GB")
    ] = 5.0,
    dtype: ChosenDtype = None,
    original: Annotated[
        Path | None,
        Option(
            help="Take context length, special tokens, chat template and settings of generation "
            "from this checkpoint, which was made from the model that SRC began as; by default, "
            "those of SRC.",
            metavar="DIR",
        ),
    ] = None,
    license_id: Annotated[
        str,
        Option(
            "--license",
            help="Name this licence of the weights in the model card, such as apache-2.0.",
            metavar="NAME",
        ),
    ] = "unknown",
) -> None:
    """Convert a checkpoint or a run to a folder that transformers loads with trust_remote_code.

    Examples:
        moepp convert mcore-to-hf runs/quickstart exported
        moepp convert mcore-to-hf runs/mine exported --dtype bf16 --license apache-2.0
    """
    _begin(target)
    from moepp_megatron.interop.to_hf import mcore_to_hf as convert

    shard_bytes, chosen = int(max_shard_gb * 1e9), None if dtype is None else dtype.value
    warnings = convert(
        source,
        target,
        layout.value,
        shard_bytes,
        dtype=chosen,
        license_id=license_id,
        original=original,
    )
    warn(*warnings)
    echo(f"model        {target}")


@app.command("upcycle")
def _upcycle(
    source: Source,
    target: Target,
    zero: Annotated[
        int, Option(min=0, help="Add this many zero experts.")
    ] = LayerSettings.num_zero_experts,
    copy: Annotated[
        int, Option(min=0, help="Add this many copy experts.")
    ] = LayerSettings.num_copy_experts,
    constant: Annotated[
        int, Option(min=0, help="Add this many constant experts.")
    ] = LayerSettings.num_constant_experts,
    gating_residual: Annotated[
        bool, Option(help="Add gating residuals, which are 0 at first, or none.")
    ] = True,
    tau: Annotated[
        float, Option(min=0.001, help="Set moe.tau of the new model.", metavar="TAU")
    ] = LayerSettings.tau,
    experts: Annotated[int, Option(min=1, help="Give a dense model this many FFN experts.")] = 8,
    topk: Annotated[
        int, Option(min=1, help="Select this many experts per token of a dense model.")
    ] = 2,
    seed: Annotated[int, Option(help="Initialize what is new with this seed.")] = 1234,
    approximate: Annotated[
        bool,
        Option(
            "--approximate",
            help="Accept a model whose gates shrink a little too (norm_topk_prob false).",
        ),
    ] = False,
    zeda_router: Annotated[
        bool,
        Option(
            "--zeda-router",
            help="Give new experts router rows as ZEDA does, without a selection bias: tokens "
            "select them from the first step on, and the model computes something else.",
        ),
    ] = False,
    dtype: ChosenDtype = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Convert a checkpoint of another model to a MoE++ one that computes the same.

    It takes Llama, Qwen3, Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE and DeepSeek-V3.

    Examples:
        moepp convert upcycle mixtral upcycled --zero 1 --copy 1 --constant 2
        moepp convert upcycle llama upcycled --experts 8 --topk 2 --dtype bf16
    """
    _begin(target)
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
        keeps_function=not zeda_router,
    )
    config = convert(source, target, additions, dtype, allow_pickle)
    echo(f"checkpoint   {target}")
    least = least_gate(config)
    if least < 1.0:
        echo(f"gates        at least {least:.3f} of what they were, for --approximate")
    if config.moe.num_zero_computation_experts and not zeda_router:
        echo(
            f"FFN share    1 now; the first steps of training move it to phi "
            f"({config.moe.ffn_share:.3f}), or a ramp of moe.budget: docs/how_to/upcycle.md"
        )


@app.command("megatron-lm")
def _megatron_lm(
    source: Annotated[
        Path,
        Argument(
            help="Convert the newest checkpoint of this --save folder of Megatron-LM, or this one "
            "iter_* folder.",
            metavar="SRC",
        ),
    ],
    target: Target,
    tokenizer: Annotated[
        Path | None,
        Option(
            help="Add this tokenizer.json, with which the run's data were made.", metavar="FILE"
        ),
    ] = None,
    moepp_args: Annotated[
        str | None,
        Option(
            help="Take the settings from the run's MOEPP_ARGS where the checkpoint has none.",
            metavar="TEXT",
        ),
    ] = None,
) -> None:
    """Convert a checkpoint of Megatron-LM's own loop to one of ours.

    `score`, `generate`, `inspect` and `convert` load it. The weights are not copied where the file
    system has hard links.

    Examples:
        moepp convert megatron-lm checkpoints converted --tokenizer tokenizer.json
    """
    _begin(target)
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
def _to_megatron_lm(source: Source, target: Target) -> None:
    """Convert a checkpoint or a run to one that Megatron-LM's own loop takes with --load.

    It has only the weights.

    Examples:
        moepp convert to-megatron-lm runs/quickstart for_megatron
    """
    _begin(target)
    from moepp_megatron.interop.to_megatron_lm import ARGUMENTS_FILE
    from moepp_megatron.interop.to_megatron_lm import to_megatron_lm as convert

    arguments = convert(source, target)
    echo(f"checkpoint   {target}")
    echo(f"arguments    {target / ARGUMENTS_FILE}: {arguments}")


def _begin(target: Path) -> None:
    """Refuse a DST that is taken at once: the converters import torch."""
    from moepp_megatron.interop.convert import free_folder
    from moepp_megatron.runtime.optional import quiet

    free_folder(target)
    quiet()
