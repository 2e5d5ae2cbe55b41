"""`moepp data prepare`: text to Megatron indexed datasets and a tokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moepp_megatron.data.manifest import Manifest
    from moepp_megatron.runtime.terminal import Console

app = typer.Typer(help="Prepare training data.", no_args_is_help=True)


@app.callback()
def _data() -> None:
    # With a callback, typer keeps `prepare` a sub-command although it is the only one.
    pass


@app.command(
    help="Write a dataset folder: indexed dataset, tokenizer, manifest. One file is one document; "
    "so is one JSONL line and one parquet row. The folder appears when it is complete; if it is "
    "there already and was made from the same inputs, it is left alone."
)
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Text, JSONL or parquet files, folders of them, or the word stdlib: the library "
            "sources of the Python that runs this.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    vocab_size: Annotated[
        int | None,
        typer.Option(help="Size of the tokenizer that is trained.", show_default="4096"),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Use this tokenizer.json instead of training one.")
    ] = None,
    eod_token: Annotated[
        str | None,
        typer.Option(
            help="End-of-document token of --tokenizer.", show_default="the first well-known one"
        ),
    ] = None,
    text_key: Annotated[str, typer.Option(help="JSONL key or parquet column of the text.")] = (
        "text"
    ),
    workers: Annotated[
        int | None,
        typer.Option(help="Processes; changes the time only.", show_default="one a core"),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the document order and the tokenizer's sample.")
    ] = 1234,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a dataset that is already there.")
    ] = False,
) -> None:
    """Prepare a dataset folder.

    Raises:
        ConfigError: an argument, a source or the output folder cannot be used.
    """
    from moepp_megatron.data.prepare import PrepareSettings
    from moepp_megatron.data.prepare import prepare as prepare_data
    from moepp_megatron.runtime.quiet import quiet
    from moepp_megatron.runtime.terminal import Console

    quiet()
    console = Console()
    settings = PrepareSettings(
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        eod_token=eod_token,
        text_key=text_key,
        seed=seed,
        workers=workers,
        force=force,
    )
    prepared = prepare_data(sources, out, settings, console)
    if prepared.up_to_date:
        typer.echo(f"{out}: up to date, {prepared.manifest.tokens:,} tokens")
    else:
        _print_summary(console, prepared.manifest)
        typer.echo(f"{out}: written, {prepared.manifest.tokens:,} tokens")


def _print_summary(console: "Console", manifest: "Manifest") -> None:
    from rich.table import Table

    table = Table("source", title="documents")
    for column in ("files", "MB", "documents", "skipped", "tokens"):
        table.add_column(column, justify="right")
    for source in manifest.sources:
        table.add_row(
            source.name,
            f"{source.files:,}",
            f"{source.bytes / 1e6:.2f}",
            f"{source.documents:,}",
            f"{source.skipped:,}",
            f"{source.tokens:,}",
        )
    console.print(table)
    for reason, count in manifest.skipped_reasons.items():
        typer.echo(f"skipped {count:,}: {reason}")
    typer.echo(f"vocabulary: {manifest.vocab_size:,} tokens, end of document {manifest.eod_id}")
