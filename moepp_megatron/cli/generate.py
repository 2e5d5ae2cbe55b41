"""`moepp generate`: samples text from a checkpoint in any layout."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from moepp_megatron.cli.echo import echo
from moepp_megatron.cli.options import CheckpointArgument, LayoutArgument, NprocOption
from moepp_megatron.cli.ranks import option_words, start_ranks
from moepp_megatron.runtime.printable import printable


def generate(
    checkpoint: CheckpointArgument,
    prompt: Annotated[
        list[str],
        Option(
            help="Continue this text; give the option several times to continue several texts side "
            "by side.",
            metavar="TEXT",
        ),
    ],
    overrides: LayoutArgument = None,
    nproc: NprocOption = 1,
    chat: Annotated[
        bool,
        Option(
            "--chat",
            help="Take the text as a message of a user and continue with the answer, by the chat "
            "template that belongs to the checkpoint's tokenizer.",
        ),
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        Option(
            min=1,
            help="Generate at most this many tokens.",
            metavar="TOKENS",
            show_default="96, or as many as fit into the model's sequence length",
        ),
    ] = None,
    temperature: Annotated[
        float,
        Option(min=0.0, help="Sample at this temperature; 0 always takes the likeliest token."),
    ] = 0.8,
    top_p: Annotated[
        float,
        Option(
            min=0.0,
            max=1.0,
            help="Sample among the likeliest tokens that have this much probability together.",
        ),
    ] = 0.95,
    seed: Annotated[
        int,
        # The generators' seeds are 64 bits wide, and one is counted up for each prompt.
        Option(
            min=0,
            max=2**62,
            help="Sample with this seed, which gives the same text in every layout.",
        ),
    ] = 1234,
) -> None:
    """Continue a text with the model of CHECKPOINT, up to its end-of-document token.

    Examples:
        moepp generate runs/quickstart --prompt "def main("
        moepp generate runs/fine_tuned --chat --prompt "In which module is deepcopy?"
    """
    from moepp_megatron.runtime.optional import quiet

    quiet()
    from moepp_megatron.interop.generate import GenerateRequest, Sampling
    from moepp_megatron.runtime.rank import RankEnvironment
    from moepp_megatron.training.checkpoint.find import newest_again

    rank = RankEnvironment.read()
    world_size = rank.world_size if rank.is_launched else nproc
    sampling = Sampling(temperature, top_p, seed)

    @newest_again
    def sample(checkpoint: Path) -> list[str] | None:
        request = GenerateRequest.read(
            checkpoint, prompt, overrides or [], world_size, max_new_tokens, sampling, chat
        )
        if not rank.is_launched and nproc > 1:
            options = option_words(
                prompt=prompt,
                max_new_tokens=request.max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                chat=chat,
            )
            start_ranks(nproc, ["generate", *options, str(checkpoint), *(overrides or [])])
            return None
        if rank.rank == 0:
            for notice in request.scoring.notices:
                echo(f"note: {notice}", err=True)
        return request.run()

    texts = sample(checkpoint)
    if texts is not None and rank.rank == 0:
        # An empty line between texts.
        text = "\n\n".join(texts)
        # A model may have learnt to write what a terminal obeys; a file gets what it wrote.
        typer.echo(printable(text) if sys.stdout.isatty() else text)
