"""Puts conversations into sequences, and writes these with a mark for each token."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.data.chat_template import ChatTemplate
from moepp_megatron.data.corpus import WrittenCorpus, write_documents
from moepp_megatron.data.documents import Piece
from moepp_megatron.data.encoding import token_dtype
from moepp_megatron.data.manifest import CORPUS, MARKS, Conversations
from moepp_megatron.data.progress import track
from moepp_megatron.data.read_chat import Encoded, encode_chat, notice_of_ends
from moepp_megatron.data.sources import TextSource
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.file_names import CHAT_TEMPLATE_FILE
from moepp_megatron.runtime.terminal import Console


def write_chat(
    pieces: Sequence[Piece],
    sources: Sequence[TextSource],
    template: ChatTemplate,
    sequence_length: int,
    seed: int,
    folder: Path,
    console: Console,
) -> WrittenCorpus:
    """Write everything of a folder of conversations but its tokenizer, which is there.

    Args:
        pieces: the pieces of `plan_pieces`.
        sources: the resolved sources.
        template: renders and encodes.
        sequence_length: tokens of a sequence.
        seed: Seed of the order.
        folder: the folder.
        console: shows the progress.
    """
    tokenizer = template.tokenizer
    with track(console, "encode", sum(piece.size for piece in pieces)) as advance:
        encoded = encode_chat(pieces, sources, template, sequence_length, folder / "spool", advance)
    notice = notice_of_ends(encoded, tokenizer)
    if notice is not None:
        console.print(f"note: {notice}", highlight=False, soft_wrap=True, markup=False)
    sequences, hashes = _write_sequences(encoded, tokenizer, sequence_length, folder, seed)
    encoded.path.unlink()
    text = template.text.encode()
    (folder / CHAT_TEMPLATE_FILE).write_bytes(text)
    hashes |= {CHAT_TEMPLATE_FILE: hashlib.sha256(text).hexdigest()}
    tokens = sequences * sequence_length
    return WrittenCorpus(
        encoded.sources,
        encoded.skipped,
        sequences,
        tokens,
        hashes,
        chat=Conversations(
            sequence_length=sequence_length,
            conversations=len(encoded.lengths),
            answer_tokens=encoded.answer_tokens,
            padding_tokens=tokens - sum(encoded.lengths),
        ),
    )


def _write_sequences(
    encoded: Encoded, tokenizer: Tokenizer, sequence_length: int, folder: Path, seed: int
) -> tuple[int, dict[str, str]]:
    """Write corpus and marks with megatron-core's builder.

    Conversations are shuffled once, put into sequences, and these shuffled again: the sequences
    for validation are the last ones, and would otherwise be those with the most padding.

    Args:
        encoded: the conversations.
        tokenizer: padding is its end-of-document token.
        sequence_length: tokens of a sequence.
        folder: the folder.
        seed: Seed of the order.

    Returns:
        How many there are, and SHA-256 by file name.
    """
    from moepp_megatron.data.conversations import FIRST, PADDED

    codes = np.memmap(encoded.path, dtype=np.int32, mode="r")
    ends = np.cumsum(encoded.lengths)
    # RandomState, because NumPy promises its stream across versions.
    random = np.random.RandomState(seed)
    packs = pack(encoded.lengths, random.permutation(len(encoded.lengths)), sequence_length)
    order = random.permutation(len(packs))
    dtype = token_dtype(tokenizer.vocab_size)

    def sequences() -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        for number in order:
            tokens = np.full(sequence_length, tokenizer.eod, dtype)
            marks = np.full(sequence_length, PADDED, np.uint8)
            start = 0
            for index in packs[number]:
                own = codes[ends[index] - encoded.lengths[index] : ends[index]]
                tokens[start : start + len(own)] = own >> 1
                # The lowest bit of a code is `conversations.LEARNT`.
                marks[start : start + len(own)] = own & 1
                marks[start] |= FIRST
                start += len(own)
            if start < sequence_length:
                marks[start] |= FIRST
            yield tokens, marks

    hashes = write_documents(folder / CORPUS, (tokens for tokens, _ in sequences()), dtype)
    hashes |= write_documents(folder / MARKS, (marks for _, marks in sequences()), np.uint8)
    return len(packs), hashes


def pack(lengths: Sequence[int], order: NDArray[np.int64], room: int) -> list[list[int]]:
    """Put conversations into sequences, each into the fullest one that has room for it.

    Args:
        lengths: tokens of each conversation, at most `room`.
        order: the order in which they are put.
        room: tokens of a sequence.

    Returns:
        The conversations of each sequence.
    """
    packs: list[list[int]] = []
    # Tokens left, and the sequence.
    spaces: list[tuple[int, int]] = []
    for index in order.tolist():
        found = bisect_left(spaces, (lengths[index], -1))
        if found == len(spaces):
            packs.append([])
            space, number = room, len(packs) - 1
        else:
            space, number = spaces.pop(found)
        packs[number].append(index)
        if space > lengths[index]:
            insort(spaces, (space - lengths[index], number))
    return packs
