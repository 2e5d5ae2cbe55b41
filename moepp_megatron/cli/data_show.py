"""`moepp data show`: what prepared data hold, and what a run will draw of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moepp_megatron.cli.echo import echo
from moepp_megatron.cli.options import OverridesArgument
from moepp_megatron.cli.planned import planned_samples

if TYPE_CHECKING:
    from moepp_megatron.data.manifest import Manifest
    from moepp_megatron.data.show import Corpus, StageShares


def show(
    what: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|CONFIG",
            help="Show this prepared folder, the PREFIX of a .bin and .idx, or what a run of this "
            "YAML configuration draws.",
        ),
    ],
    overrides: OverridesArgument = None,
    document: Annotated[
        int, typer.Option(help="Print this document, counted from 0 in the shuffled order.", min=0)
    ] = 0,
    tokens: Annotated[int, typer.Option(help="Print this many tokens of it at most.", min=0)] = 200,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Decode with this tokenizer; by default, with the folder's.", metavar="FILE"
        ),
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
