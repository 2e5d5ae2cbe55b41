"""`moepp generate`: samples text from a checkpoint on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint folder, or a run.", metavar="CHECKPOINT")
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 96,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 always takes the likeliest token.")
    ] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from this much probability.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 1234,
) -> None:
    """Continue PROMPT with the model of CHECKPOINT."""
    from moepp_megatron.runtime.quiet import quiet

    quiet()
    from moepp_megatron.training.generate import generate_text

    text = generate_text(checkpoint, prompt, max_new_tokens, temperature, top_p, seed)
    typer.echo(text)
