"""`moepp score`: per-token log-probabilities in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from moepp_megatron.cli.echo import echo
from moepp_megatron.cli.options import CheckpointArgument, LayoutArgument, NprocOption
from moepp_megatron.cli.ranks import option_words, start_ranks

if TYPE_CHECKING:
    import numpy as np


def score(
    checkpoint: CheckpointArgument,
    overrides: LayoutArgument = None,
    tokens: Annotated[
        Path | None,
        Option(help="Score the tokens input_ids [b, s] of this NPZ file.", metavar="FILE.npz"),
    ] = None,
    text: Annotated[
        Path | None,
        Option(
            help="Score this UTF-8 text instead, and print its loss and perplexity.", metavar="FILE"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        Option(
            help="Write the log-probabilities to this NPZ file; --tokens needs it.",
            metavar="FILE.npz",
        ),
    ] = None,
    nproc: NprocOption = 1,
    logits: Annotated[
        bool, Option("--logits", help="Also write the logits [b, s, vocab].")
    ] = False,
) -> None:
    """Write token_logprobs [b, s-1] of given tokens, or print the perplexity of a text.

    A text is read in windows of the model's sequence length, each of which begins with the last
    token of the one before. With --out its token_ids and token_logprobs are written, N of each.

    Examples:
        moepp score runs/quickstart --text README.md
        moepp score runs/quickstart --tokens tokens.npz --out scores.npz
    """
    from moepp_megatron.runtime.optional import quiet

    quiet()
    from moepp_megatron.interop.score import ScoreRequest
    from moepp_megatron.runtime.rank import RankEnvironment
    from moepp_megatron.training.checkpoint.find import newest_again

    rank = RankEnvironment.read()
    rank.check_nproc(nproc)
    world_size = rank.world_size if rank.is_launched else nproc

    @newest_again
    def read_scores(
        checkpoint: Path,
    ) -> tuple[ScoreRequest, dict[str, np.ndarray]] | None:
        request = ScoreRequest.read(
            checkpoint, tokens, out, overrides or [], world_size, logits, text
        )
        if rank.rank == 0:
            for notice in request.notices:
                echo(f"note: {notice}", err=True)
        if not rank.is_launched and nproc > 1:
            options = option_words(tokens=tokens, text=text, out=out, logits=logits)
            start_ranks(nproc, ["score", *options, str(checkpoint), *(overrides or [])])
            return None
        scores = request.run()
        return None if scores is None else (request, scores)

    found = read_scores(checkpoint)
    if found is None:
        return
    request, scores = found
    if request.text is not None:
        for line in request.text.lines(scores["token_logprobs"]):
            echo(line)
    if request.out is not None:
        echo(f"scores       {request.out}")
