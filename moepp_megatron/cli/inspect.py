"""`moepp inspect`: which tokens of a text take which experts, as a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moepp_megatron.cli.echo import echo
from moepp_megatron.cli.options import CheckpointArgument, LayoutArgument, NprocOption
from moepp_megatron.cli.ranks import start_ranks

if TYPE_CHECKING:
    from moepp_megatron.workbench.inspection.request import InspectRequest


def inspect(
    checkpoint: CheckpointArgument,
    text: Annotated[Path, typer.Option(help="Text to read, UTF-8.", metavar="FILE")],
    overrides: LayoutArgument = None,
    out: Annotated[Path, typer.Option(help="Page to write.", metavar="PAGE.html")] = Path(
        "inspect.html"
    ),
    against: Annotated[
        Path | None,
        typer.Option(help="A second checkpoint to show beside the first.", metavar="CHECKPOINT"),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Also write all numbers as JSON.", metavar="FILE")
    ] = None,
    language: Annotated[
        Literal["auto", "text", "python"],
        typer.Option(help="Whether the text has keywords and identifiers; auto asks its name."),
    ] = "auto",
    pos_tags: Annotated[
        Path | None,
        typer.Option(
            help="Parts of speech: lines of word, tab, tag, or a JSON list of such pairs.",
            metavar="FILE",
        ),
    ] = None,
    tagger: Annotated[
        Literal["nltk", "spacy"] | None,
        typer.Option(help="Have an installed package tag parts of speech."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=2, max=200_000, help="Tokens to read at most.")
    ] = 16_384,
    nproc: NprocOption = 1,
) -> None:
    """Write a page: the text coloured by FFN experts per token, and each token's experts."""
    from moepp_megatron.runtime.quiet import quiet

    quiet()
    from moepp_megatron.runtime.rank import RankEnvironment
    from moepp_megatron.workbench.inspection.request import InspectRequest

    rank = RankEnvironment.read()
    world_size = rank.world_size if rank.is_launched else nproc
    options: dict[str, Any] = {
        "against": against,
        "json": json,
        "language": language,
        "pos_tags": pos_tags,
        "tagger": tagger,
        "max_tokens": max_tokens,
    }
    request = InspectRequest.read(checkpoint, text, out, overrides or [], world_size, **options)
    if rank.is_launched or nproc == 1:
        _inspect_rank(request)
        return
    arguments = ["inspect", str(checkpoint), f"--text={text}", f"--out={out}"]
    arguments += [
        f"--{name.replace('_', '-')}={value}"
        for name, value in options.items()
        if value is not None
    ]
    start_ranks(nproc, [*arguments, *(overrides or [])])


def _inspect_rank(request: InspectRequest) -> None:
    from moepp_megatron.runtime import distributed
    from moepp_megatron.runtime.rank import RankEnvironment
    from moepp_megatron.workbench.inspection.record import trace_models

    rank = RankEnvironment.read()
    if rank.rank == 0:
        for notice in request.notices:
            echo(f"note: {notice}", err=True)
    with distributed.joined(rank):
        traces = trace_models(request)
    if rank.rank == 0:
        from moepp_megatron.workbench.report.inspect import write_inspection

        for name, path in write_inspection(request, traces):
            echo(f"{name:12} {path}")
