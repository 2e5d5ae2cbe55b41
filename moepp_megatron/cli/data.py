"""`moepp data`: text to Megatron indexed datasets and a tokenizer, and whether they are intact."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moepp_megatron.cli.echo import echo

if TYPE_CHECKING:
    from moepp_megatron.data.manifest import Manifest
    from moepp_megatron.data.verify import FileState
    from moepp_megatron.runtime.terminal import Console

app = typer.Typer(help="Prepare and check training data.", no_args_is_help=True)


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
            help="Text, JSONL (.jsonl, .ndjson) or parquet files, also .gz and .zst of the first "
            "two, folders of them, or the word stdlib: the library sources of the Python that runs "
            "this. NAME=PATH names a data source, which metrics of a run tell apart.",
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
        ConfigError: if an argument, a source or the output folder cannot be used.
    """
    from moepp_megatron.data.prepare import PrepareSettings
    from moepp_megatron.data.prepare import prepare as prepare_data
    from moepp_megatron.runtime.terminal import Console

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
        echo(f"{out}: up to date, {prepared.manifest.tokens:,} tokens")
    else:
        _print_summary(console, prepared.manifest)
        echo(f"{out}: written, {prepared.manifest.tokens:,} tokens")


def _print_summary(console: "Console", manifest: "Manifest") -> None:
    from rich.table import Table

    from moepp_megatron.data.manifest import MAX_SOURCES

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
        echo(f"skipped {count:,}: {reason}")
    if manifest.split is not None:
        train, validation, _ = manifest.split.split(",")
        echo(f"split: {train} documents to train on, {validation} of other packages to validate")
    if len(manifest.source_names) > MAX_SOURCES:
        echo(
            f"data sources: {len(manifest.source_names)}, and runs have metrics of {MAX_SOURCES} "
            "at most; give several one name with NAME=PATH to have them"
        )
    echo(f"vocabulary: {manifest.vocab_size:,} tokens, end of document {manifest.eod_id}")


@app.command(
    help="Check every byte of a prepared folder: sizes, hashes, index, and that every token is in "
    "the vocabulary. Exit code 2 if anything is wrong."
)
def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder written by `moepp data prepare`.")
    ],
) -> None:
    """Check a prepared folder.

    Raises:
        ConfigError: if it is not one, or damaged.
    """
    from moepp_megatron.data.progress import track
    from moepp_megatron.data.verify import damaged, read_manifest
    from moepp_megatron.data.verify import verify as verify_data
    from moepp_megatron.runtime.terminal import Console

    manifest = read_manifest(folder, "DIR")
    console = Console()
    with track(console, "verify", sum(manifest.files.values())) as advance:
        states = verify_data(folder, manifest, advance)
    _print_states(console, states)
    problems = [state.problem for state in states if state.problem]
    if problems:
        raise damaged("DIR", folder, ", ".join(problems))
    if not all(state.compared for state in states):
        echo(
            "no hashes: an earlier version has prepared this, so that sizes, index and tokens "
            "alone were checked; moepp data prepare --force adds hashes"
        )
    echo(f"{folder}: intact, {manifest.documents:,} documents, {manifest.tokens:,} tokens")


def _print_states(console: "Console", states: "list[FileState]") -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("file")
    table.add_column("bytes", justify="right")
    table.add_column("state")
    for state in states:
        size = "-" if state.size is None else f"{state.size:,}"
        sound = "intact" if state.compared else "no hash; as far as can be told intact"
        table.add_row(state.name, size, Text(state.problem or sound))
    console.print(table)
