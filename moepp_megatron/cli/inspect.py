"""`moepp inspect`: which tokens of a text take which experts, as a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from moepp_megatron.cli.echo import echo
from moepp_megatron.cli.options import CheckpointArgument, JsonOption, LayoutArgument, NprocOption
from moepp_megatron.cli.ranks import option_words, start_ranks

if TYPE_CHECKING:
    from moepp_megatron.tools.inspection.request import InspectRequest


def inspect(
    checkpoint: CheckpointArgument,
    text: Annotated[Path, Option(help="Read this UTF-8 text.", metavar="FILE")],
    overrides: LayoutArgument = None,
    out: Annotated[Path, Option(help="Write the page to this file.", metavar="FILE.html")] = Path(
        "inspect.html"
    ),
    json: JsonOption = None,
    language: Annotated[
        Literal["auto", "text", "python"],
        Option(
            help="Choose python for a text with keywords and identifiers; auto decides by its name."
        ),
    ] = "auto",
    max_tokens: Annotated[
        int,
        Option(min=2, max=200_000, help="Read at most this many tokens.", metavar="TOKENS"),
    ] = 16_384,
    nproc: NprocOption = 1,
) -> None:
    """Write a page: the text coloured by FFN experts per token, each token's experts, and means.

    Examples:
        moepp inspect runs/quickstart --text README.md
        moepp inspect runs/quickstart --text README.md --json - --nproc 2
    """
    from moepp_megatron.runtime.optional import quiet

    quiet()
    from moepp_megatron.runtime.rank import RankEnvironment
    from moepp_megatron.tools.inspection.request import InspectRequest
    from moepp_megatron.training.checkpoint.find import newest_again

    rank = RankEnvironment.read()
    world_size = rank.world_size if rank.is_launched else nproc
    options: dict[str, Any] = {"json": json, "language": language, "max_tokens": max_tokens}

    @newest_again
    def write_page(checkpoint: Path) -> None:
        request = InspectRequest.read(checkpoint, text, out, overrides or [], world_size, **options)
        if rank.is_launched or nproc == 1:
            _inspect_rank(request)
            return
        words = option_words(text=text, out=out, **options)
        start_ranks(nproc, ["inspect", *words, str(checkpoint), *(overrides or [])])

    write_page(checkpoint)


def _inspect_rank(request: InspectRequest) -> None:
    from moepp_megatron.runtime.rank_environment import prepare_rank

    rank = prepare_rank(request.model.scoring.config)
    from moepp_megatron.runtime import distributed
    from moepp_megatron.tools.inspection.record import trace_model

    if rank.rank == 0:
        for notice in request.notices:
            echo(f"note: {notice}", err=True)
    with distributed.initialized(rank):
        trace = trace_model(request)
    if trace is not None:
        from moepp_megatron.tools.report.inspection import write_inspection

        for name, path in write_inspection(request, trace):
            echo(f"{name:12} {path}")
