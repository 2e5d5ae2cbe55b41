"""Writes the Megatron indexed dataset: documents tokenized in reading order, stored shuffled.

Documents for validation come last, because megatron-core splits by position.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.data.documents import no_usable_document
from moepp_megatron.data.encoding import EncodedPiece, count_skipped
from moepp_megatron.data.manifest import (
    CORPUS,
    DOCUMENT_SOURCES,
    MAX_SOURCES,
    Conversations,
    SourceSummary,
)
from moepp_megatron.data.sources import TextSource

_VALIDATION_SHARE = 0.05
_Ints = NDArray[np.int64]
# Of a document that belongs to no group.
ALONE = -1


@dataclass(frozen=True)
class _SpooledCorpus:
    """Tokens in reading order, in a temporary file, and [documents] arrays about them."""

    # The ids, one document after the other, each ending with EOD.
    path: Path
    dtype: type[np.uint16] | type[np.int32]
    lengths: _Ints
    # A number for each group, or `ALONE`.
    groups: _Ints
    # In the order of `Manifest.source_names`.
    source_ids: _Ints
    sources: list[SourceSummary]
    skipped: Counter[str]


def spool_corpus(
    encoded: Iterable[EncodedPiece],
    sources: Sequence[TextSource],
    dtype: type[np.uint16] | type[np.int32],
    path: Path,
    advance: Callable[[int], None],
    unusable: Callable[[TextSource, Counter[str]], ConfigError] = no_usable_document,
) -> _SpooledCorpus:
    """Append every piece to a file, so that memory holds the lengths only.

    A source without a single usable document raises the error that `unusable` makes of it.
    """
    # [3, documents] of each piece: lengths, groups, data sources.
    columns: list[_Ints] = []
    numbers: dict[str | None, int] = {None: ALONE}
    names = list(dict.fromkeys(source.name for source in sources))
    summaries, all_skipped = [], Counter[str]()
    with path.open("wb") as stream:
        # Every source has a piece.
        for index, pieces in groupby(encoded, lambda each: each.piece.source):
            source, documents, tokens, skipped = sources[index], 0, 0, Counter[str]()
            for each in pieces:
                stream.write(each.tokens.astype(dtype, copy=False).tobytes())
                count = len(each.lengths)
                group = numbers.setdefault(each.piece.group, len(numbers))
                places = (np.full(count, number) for number in (group, names.index(source.name)))
                columns.append(np.stack([each.lengths, *places]))
                documents += count
                tokens += len(each.tokens)
                count_skipped(skipped, each.skipped)
                advance(each.piece.size)
            if not documents:
                raise unusable(source, skipped)
            summaries.append(source.summary(documents, skipped.total(), tokens))
            all_skipped += skipped
    lengths, groups, source_ids = np.concatenate(columns, axis=1)
    return _SpooledCorpus(path, dtype, lengths, groups, source_ids, summaries, all_skipped)


@dataclass(frozen=True)
class WrittenCorpus:
    """The written corpus in terms of the manifest.

    `sha256`, by file name, is of the bytes that were to be written: it shows errors of the storage.
    `split` has the weights of train, validation and test by documents; None if any will do.
    """

    sources: list[SourceSummary]
    skipped: Counter[str]
    documents: int
    tokens: int
    sha256: dict[str, str]
    split: str | None = None
    chat: Conversations | None = None


def write_indexed_dataset(spooled: _SpooledCorpus, folder: Path, seed: int) -> WrittenCorpus:
    """Write `folder/corpus.bin` and `folder/corpus.idx`; the temporary file is removed.

    Where documents come from several data sources, `folder/sources.npy` says which is whose.
    Documents are shuffled here because Megatron splits train, validation and test by position: in
    reading order the validation split would be the last files of the last source.
    """
    tokens = np.memmap(spooled.path, dtype=spooled.dtype, mode="r")
    ends = np.cumsum(spooled.lengths)
    order, validation = _arrange(spooled.groups, spooled.lengths, seed)
    documents = (tokens[ends[each] - spooled.lengths[each] : ends[each]] for each in order)
    hashes = write_documents(folder / CORPUS, documents, spooled.dtype)
    if 1 < spooled.source_ids.max() + 1 <= MAX_SOURCES:
        sources_file = folder / DOCUMENT_SOURCES
        np.save(sources_file, spooled.source_ids[order].astype(np.uint8))
        hashes[sources_file.name] = hashlib.sha256(sources_file.read_bytes()).hexdigest()
    split = None if validation is None else f"{len(order) - validation},{validation},0"
    spooled.path.unlink()
    lengths = spooled.lengths
    return WrittenCorpus(
        spooled.sources, spooled.skipped, len(lengths), int(lengths.sum()), hashes, split
    )


def write_documents(
    prefix: Path, documents: Iterable[NDArray[Any]], dtype: type[np.generic]
) -> dict[str, str]:
    """Write `PREFIX.bin` and `.idx` with megatron-core's builder; return SHA-256 by file name."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    bin_file, idx_file = prefix.with_suffix(".bin"), prefix.with_suffix(".idx")
    builder = IndexedDatasetBuilder(str(bin_file), dtype=dtype)
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document)
        builder.add_document(document, [len(document)])
    builder.finalize(str(idx_file))
    with idx_file.open("rb") as stream:
        idx_digest = hashlib.file_digest(stream, "sha256")
    return {bin_file.name: digest.hexdigest(), idx_file.name: idx_digest.hexdigest()}


def _arrange(groups: _Ints, lengths: _Ints, seed: int) -> tuple[_Ints, int | None]:
    """Shuffle documents; return how many at the end are for validation too, or None for any."""
    # RandomState, because NumPy promises its stream across versions; default_rng's may change.
    random = np.random.RandomState(seed)
    order = random.permutation(len(lengths)).astype(np.int64)
    if (groups == ALONE).all():
        return order, None
    own_groups = np.arange(len(groups)) + groups.max() + 1
    _, units = np.unique(np.where(groups == ALONE, own_groups, groups), return_inverse=True)
    tokens = np.bincount(units, weights=lengths).astype(np.int64)
    if len(tokens) < 2:
        return order, None
    left = int(_VALIDATION_SHARE * tokens.sum())
    # Groups in a random order, each that still fits; a document of no group is one by itself.
    # If not even the smallest fits, it is taken all the same.
    chosen = np.zeros(len(tokens), dtype=bool)
    for unit in random.permutation(len(tokens)):
        if tokens[unit] <= left:
            chosen[unit] = True
            left -= int(tokens[unit])
    if not chosen.any():
        chosen[tokens.argmin()] = True
    is_validation = chosen[units[order]]
    return np.concatenate([order[~is_validation], order[is_validation]]), int(is_validation.sum())
