"""`moepp data`: prepares text as Megatron indexed datasets, and checks and shows prepared data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from moepp_megatron.cli.echo import echo
from moepp_megatron.cli.options import OverridesArgument
from moepp_megatron.cli.planned import planned_samples

if TYPE_CHECKING:
    from moepp_megatron.data.manifest import Manifest
    from moepp_megatron.data.show import Corpus, StageShares
    from moepp_megatron.data.verify import FileState

app = typer.Typer(
    help="""Prepare, check and show training data.

    Examples:
        moepp data prepare corpus.jsonl --out data/mine
        moepp data show data/mine
    """,
    no_args_is_help=True,
)


@app.command("prepare")
def _prepare(
    sources: Annotated[
        list[str],
        Argument(
            metavar="SOURCE",
            help="Read these files: text, JSONL (.jsonl, .ndjson), also compressed as .gz or .zst, "
            "parquet, and folders of these. The word stdlib reads the library sources of the "
            "Python that runs this. NAME=PATH names a data source, which the metrics of a run then "
            "show apart from others.",
        ),
    ],
    out: Annotated[Path, Option(help="Write the dataset to this folder.", metavar="DIR")],
    vocab_size: Annotated[
        int | None, Option(help="Train a tokenizer of this many tokens; by default, of 4096.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        Option(
            help="Use this tokenizer instead of training one: a tokenizer.json, a Hugging Face "
            "folder, a sentencepiece .model, or a file of tiktoken's ranks.",
            metavar="FILE|DIR",
        ),
    ] = None,
    eod_token: Annotated[
        str | None,
        Option(
            help="End documents with this token of --tokenizer; by default, with the first "
            "well-known name that it has.",
            metavar="TOKEN",
        ),
    ] = None,
    text_key: Annotated[
        str,
        Option(help="Take the text from this JSONL key or parquet column.", metavar="NAME"),
    ] = "text",
    chat: Annotated[
        bool,
        Option(
            "--chat",
            help="Read conversations: JSONL or parquet with messages (role, content), ShareGPT's "
            "conversations (from, value) or Alpaca's instruction, input and output. Only answers "
            "have loss. Needs --tokenizer and --seq-length.",
        ),
    ] = False,
    seq_length: Annotated[
        int | None,
        Option(
            help="With --chat, put conversations into sequences of this many tokens, the model's "
            "model.seq_length; longer ones are left out and counted.",
            metavar="TOKENS",
        ),
    ] = None,
    template: Annotated[
        Path | None,
        Option(
            help="With --chat, render conversations by this Jinja file; by default, by the chat "
            "template that belongs to the tokenizer.",
            metavar="FILE",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        Option(
            help="Use this many processes, which changes the time only; by default, one per core."
        ),
    ] = None,
    seed: Annotated[
        int,
        Option(help="Order the documents and draw the tokenizer's sample with this seed."),
    ] = 1234,
    force: Annotated[
        bool, Option("--force", help="Replace a dataset that is already there.")
    ] = False,
) -> None:
    """Write a dataset folder: indexed dataset, tokenizer, manifest.

    One file is one document; so is one JSONL line and one parquet row. With --chat a line is a
    conversation to fine-tune on. The folder appears when it
    is complete; if it is there already and was made from the same inputs, it is kept.

    Examples:
        moepp data prepare corpus.jsonl --out data/mine --vocab-size 65536
        moepp data prepare c.jsonl --out d/c --chat --tokenizer d/mine --seq-length 64
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
        chat=chat,
        sequence_length=seq_length,
        template=template,
    )
    prepared = prepare_data(sources, out, settings, console)
    if prepared.up_to_date:
        echo(f"{out}: up to date, {prepared.manifest.tokens:,} tokens")
    else:
        _print_summary(prepared.manifest)
        echo(f"{out}: written, {prepared.manifest.tokens:,} tokens")


def _print_summary(manifest: Manifest) -> None:
    from moepp_megatron.data.manifest import MAX_SOURCES
    from moepp_megatron.tools.report.terminal import plain_table, print_uncut

    kept = "documents" if manifest.chat is None else "conversations"
    table = plain_table("source", "files", "MB", kept, "skipped", "tokens", words=1)
    for source in manifest.sources:
        table.add_row(
            source.name,
            f"{source.files:,}",
            f"{source.bytes / 1e6:.2f}",
            f"{source.documents:,}",
            f"{source.skipped:,}",
            f"{source.tokens:,}",
        )
    print_uncut(table)
    for reason, count in manifest.skipped_reasons.items():
        echo(f"skipped {count:,}: {reason}")
    if manifest.chat is not None:
        chat = manifest.chat
        echo(
            f"sequences: {manifest.documents:,} of {chat.sequence_length:,} tokens, of which "
            f"{chat.answer_tokens / manifest.tokens:.0%} have loss and "
            f"{chat.padding_tokens / manifest.tokens:.0%} are padding"
        )
    if manifest.split is not None:
        train, validation, _ = manifest.split.split(",")
        echo(f"split: {train} documents to train on, {validation} of other packages to validate")
    if len(manifest.source_names) > MAX_SOURCES:
        echo(
            f"data sources: {len(manifest.source_names)}, and runs have metrics of {MAX_SOURCES} "
            "at most; give several one name with NAME=PATH to have them"
        )
    echo(f"vocabulary: {manifest.vocab_size:,} tokens, end of document {manifest.eod_id}")


@app.command("verify")
def _verify(
    folder: Annotated[
        Path,
        Argument(metavar="DIR", help="Check this folder, which moepp data prepare wrote."),
    ],
) -> None:
    """Check every byte of a prepared folder: sizes, hashes, index, and tokens in the vocabulary.

    The exit status is 2 if anything is wrong.

    Examples:
        moepp data verify data/mine
    """
    from moepp_megatron.config import ConfigError
    from moepp_megatron.config.blends import Folder
    from moepp_megatron.data.progress import track
    from moepp_megatron.data.verify import damaged, read_manifest
    from moepp_megatron.data.verify import verify as verify_data
    from moepp_megatron.runtime.terminal import Console

    named = Folder("DIR", folder)
    manifest = read_manifest(named)
    if manifest.is_bare:
        raise ConfigError(
            f"{named} must have a manifest, and a pair of .bin and .idx made elsewhere has "
            "neither hashes nor vocabulary to check; see: moepp data show"
        )
    with track(Console(), "verify", sum(manifest.files.values())) as advance:
        states = verify_data(folder, manifest, advance)
    _print_states(states)
    problems = [state.problem for state in states if state.problem]
    if problems:
        raise damaged(named, ", ".join(problems))
    if not all(state.compared for state in states):
        echo(
            "no hashes: an earlier version has prepared this, so only sizes, index and tokens "
            "were checked; moepp data prepare --force adds hashes"
        )
    echo(f"{folder}: intact, {manifest.documents:,} documents, {manifest.tokens:,} tokens")


def _print_states(states: list[FileState]) -> None:
    from moepp_megatron.tools.report.terminal import plain_table, print_uncut

    table = plain_table("file", "state", "bytes", words=2)
    for state in states:
        size = "-" if state.size is None else f"{state.size:,}"
        sound = "intact" if state.compared else "no hash; intact as far as is known"
        table.add_row(state.name, state.problem or sound, size)
    print_uncut(table)


@app.command("show")
def _show(
    what: Annotated[
        Path,
        Argument(
            metavar="DIR|CONFIG",
            help="Show this prepared folder, the PREFIX of a .bin and .idx, or what a run of this "
            "YAML configuration draws.",
        ),
    ],
    overrides: OverridesArgument = None,
    document: Annotated[
        int, Option(help="Print this document, counted from 0 in the shuffled order.", min=0)
    ] = 0,
    tokens: Annotated[int, Option(help="Print this many tokens of it at most.", min=0)] = 200,
    tokenizer: Annotated[
        Path | None,
        Option(help="Decode with this tokenizer; by default, with the folder's.", metavar="FILE"),
    ] = None,
) -> None:
    """Print counts of documents and tokens, a decoded sample, and the blend as it is drawn.

    The blend is shown by stage and over the run: each folder's share, its tokens, and how often the
    run reads all that the folder has to train on.

    Examples:
        moepp data show data/mine --document 3
        moepp data show configs/quickstart.yaml data.path=data/mine
    """
    from moepp_megatron.config import ConfigError, load_config
    from moepp_megatron.config.blends import Folder, blends_of, folders_of
    from moepp_megatron.data.show import Corpus, planned_shares

    if not what.is_file() or what.suffix in (".bin", ".idx"):
        if overrides:
            raise ConfigError(
                f"{overrides[0]!r} is a setting, and DIR|CONFIG ({what}) is no configuration; name "
                "a YAML file before it, or leave it out"
            )
        folders = {str(what): Folder("DIR", what)}
        corpora = {path: Corpus(folder) for path, folder in folders.items()}
    else:
        config = load_config(what, overrides or [])
        folders = folders_of(blends_of(config))
        if not folders:
            raise ConfigError(
                "data.path (null) must name a prepared folder; see: moepp data prepare"
            )
        tokenizer = tokenizer or config.data.tokenizer
        corpora = {path: Corpus(folder) for path, folder in folders.items()}
        for stage in planned_shares(config, corpora, planned_samples(config)):
            _print_stage(stage)
    for path, folder in folders.items():
        _print_counts(folder.path, corpora[path].manifest)
    first = next(iter(folders))
    _print_sample(folders[first].path, corpora[first], document, tokens, tokenizer)


def _print_stage(stage: StageShares) -> None:
    from moepp_megatron.tools.report.terminal import plain_table, print_uncut

    table = plain_table("folder", "share", "tokens", "epochs", words=1)
    for share in stage.shares:
        table.add_row(
            str(share.path), f"{share.share:.1%}", f"{share.tokens:,.0f}", f"{share.epochs:.3g}"
        )
    print_uncut(f"{stage.name}: steps {stage.first_step + 1:,} to {stage.last_step:,}", table)


def _print_counts(path: Path, manifest: Manifest) -> None:
    from moepp_megatron.tools.report.terminal import plain_table, print_uncut

    kept = "documents" if manifest.chat is None else "conversations"
    table = plain_table("source", kept, "tokens", "share", words=1)
    # Padding is of no source.
    total = sum(source.tokens for source in manifest.sources)
    for source in manifest.sources:
        share = source.tokens / max(total, 1)
        table.add_row(source.name, f"{source.documents:,}", f"{source.tokens:,}", f"{share:.1%}")
    print_uncut(str(path), table)
    parts = "documents" if manifest.chat is None else "sequences"
    echo(f"{path}: {manifest.documents:,} {parts}, {manifest.tokens:,} tokens")
    if manifest.is_bare:
        echo("no manifest: tokenizer, vocabulary and hashes are not known")
    else:
        echo(
            f"vocabulary: {manifest.vocab_size:,} tokens, end of document {manifest.eod_id} "
            f"({manifest.eod_token})"
        )


def _print_sample(
    path: Path, corpus: Corpus, document: int, tokens: int, tokenizer: Path | None
) -> None:
    from moepp_megatron.data.show import shown_text
    from moepp_megatron.data.tokenizer import Tokenizer

    ids = corpus.document(document).tolist()
    echo(f"document {document} of {path}, {min(tokens, len(ids)):,} of {len(ids):,} tokens:")
    if tokenizer is None and corpus.manifest.is_bare:
        echo(f"{ids[:tokens]}")
        echo("these are ids: name the tokenizer that made them with --tokenizer to see the text")
        return
    echo(shown_text(ids[:tokens], Tokenizer.load(tokenizer or path)))
