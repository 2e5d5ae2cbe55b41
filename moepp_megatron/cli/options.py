"""Arguments and options that several commands have, for the signatures of their functions."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from moepp_megatron.runtime.object_store import place

GPU_NAMES = "a name in configs/hardware, or a YAML file"
"""Values of --gpu and --hardware, for help."""

ConfigArgument = Annotated[Path, Argument(help="Read this YAML configuration.", metavar="CONFIG")]
OverridesArgument = Annotated[
    list[str] | None,
    Argument(
        help="Change these settings, such as moe.tau=0.5; moepp config keys lists all of them.",
        metavar="section.key=value",
    ),
]
CheckpointArgument = Annotated[
    Path,
    Argument(
        help="Load this checkpoint, or the newest one of this run; also from s3://bucket/prefix.",
        metavar="CHECKPOINT",
        parser=place,
    ),
]
LayoutArgument = Annotated[
    list[str] | None,
    Argument(
        help="Use this layout, such as parallel.expert_model_parallel_size=2; by default, that of "
        "a single rank.",
        metavar="parallel.key=value",
    ),
]
NprocOption = Annotated[
    int,
    Option(
        min=1, help="Start this many ranks on this machine; leave it out under torchrun or srun."
    ),
]
JsonOption = Annotated[
    Path | None,
    Option(
        "--json",
        help="Write the results as JSON to this file; - prints the JSON and nothing else.",
        metavar="FILE.json",
    ),
]
GpuOption = Annotated[
    str, Option("--gpu", help=f"Estimate for this kind of GPU: {GPU_NAMES}.", metavar="NAME")
]
PriceOption = Annotated[
    float | None,
    Option(
        "--price",
        help="Compute the cost from this price per GPU and hour; by default, from that of the "
        "hardware file, if it has one.",
        metavar="PRICE",
    ),
]
TokensOption = Annotated[
    float | None,
    Option(
        "--tokens",
        help="Estimate time and cost of training on this many tokens; by default, on those of all "
        "configured steps.",
        metavar="TOKENS",
    ),
]
NnodesOption = Annotated[
    int,
    Option("--nnodes", min=1, help="Use this many machines; run the same command on each of them."),
]
NodeRankOption = Annotated[
    int | None,
    Option(
        "--node-rank",
        min=0,
        help="Give this machine this number, counted from 0; by default, torchrun numbers them.",
    ),
]
RdzvEndpointOption = Annotated[
    str | None,
    Option(
        "--rdzv-endpoint",
        help="Meet the other machines at this address, which is that of machine 0.",
        metavar="HOST[:PORT]",
    ),
]
RdzvIdOption = Annotated[
    str,
    Option(
        "--rdzv-id",
        help="Give this start of the run a name, the same on all machines.",
        metavar="NAME",
    ),
]
