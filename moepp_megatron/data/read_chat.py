"""Reads conversations from JSONL and encodes them; what cannot be used is counted by reason."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.data.chat_records import FORMS, messages_of
from moepp_megatron.data.chat_template import ChatTemplate, Message, UnusableChat
from moepp_megatron.data.documents import Piece, Skipped, read_records
from moepp_megatron.data.manifest import SourceSummary
from moepp_megatron.data.sources import TextSource
from moepp_megatron.data.tokenizer import Tokenizer

_MOST_REASONS = 50


@dataclass
class Encoded:
    """Conversations in reading order, in a temporary file, and what was left out.

    Attributes:
        path: token ids int32, the conversations one after the other, twice the id plus 1 where a
            token is learnt.
        lengths: tokens of each conversation.
        ends: the last token of answers, by how often.
        answer_tokens: tokens with loss.
        sources: one summary per source.
        skipped: conversations left out, by reason.
    """

    path: Path
    lengths: list[int] = field(default_factory=list)
    ends: Counter[int] = field(default_factory=Counter)
    answer_tokens: int = 0
    sources: list[SourceSummary] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def check_formats(sources: Sequence[TextSource]) -> None:
    """Refuse files that hold no records.

    Raises:
        ConfigError: Naming the first.
    """
    for file in (file for source in sources for file in source.files):
        if file.format == "text":
            raise ConfigError(
                f"source {file.path} must be JSONL (.jsonl, .ndjson) or parquet with --chat, with "
                f"a line for each conversation: {FORMS}; rename it, or convert an array of JSON: "
                f"jq -c '.[]' {shlex.quote(str(file.path))} > FILE.jsonl"
            )


def encode_chat(
    pieces: Sequence[Piece],
    sources: Sequence[TextSource],
    template: ChatTemplate,
    sequence_length: int,
    path: Path,
    advance: Callable[[int], None],
) -> Encoded:
    """Render and encode every conversation.

    Args:
        pieces: the pieces of `plan_pieces`.
        sources: the resolved sources.
        template: renders and encodes.
        sequence_length: a longer conversation is left out, and counted.
        path: the temporary file.
        advance: called with the bytes read.

    Raises:
        ConfigError: a source without a single usable conversation.
    """
    encoded = Encoded(path)
    with path.open("wb") as stream:
        for index, source in enumerate(sources):
            first, skipped = len(encoded.lengths), Counter[str]()
            for piece in (piece for piece in pieces if piece.source == index):
                for record in (r for part in piece.parts for r in read_records(part)):
                    try:
                        if isinstance(record, Skipped):
                            raise UnusableChat(record.reason)
                        _add(encoded, stream, template, sequence_length, messages_of(record))
                    except UnusableChat as error:
                        # A template may tell each conversation another reason.
                        is_known = str(error) in skipped or len(skipped) < _MOST_REASONS
                        skipped[str(error) if is_known else "another reason"] += 1
                advance(piece.size)
            lengths = encoded.lengths[first:]
            if not lengths:
                raise _nothing_usable(source, skipped)
            encoded.skipped += skipped
            encoded.sources.append(
                SourceSummary(
                    name=source.name,
                    files=len(source.files),
                    bytes=source.size,
                    documents=len(lengths),
                    skipped=skipped.total(),
                    tokens=sum(lengths),
                )
            )
    return encoded


def _add(
    encoded: Encoded,
    stream: BinaryIO,
    template: ChatTemplate,
    sequence_length: int,
    messages: list[Message],
) -> None:
    ids, is_learnt = template.encode(messages)
    if len(ids) > sequence_length:
        raise UnusableChat(f"longer than {sequence_length} tokens, the --seq-length")
    stream.write((2 * np.array(ids, np.int32) + is_learnt).astype(np.int32).tobytes())
    encoded.lengths.append(len(ids))
    encoded.ends[ids[int(is_learnt.nonzero()[0][-1])]] += 1
    encoded.answer_tokens += int(is_learnt.sum())


def _nothing_usable(source: TextSource, skipped: Counter[str]) -> ConfigError:
    reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.most_common(4))
    return ConfigError(
        f"source {source.name} has no usable conversation ({reasons or 'no records'}); each line "
        f"must be {FORMS}, with an answer, and fit into --seq-length"
    )


def notice_of_ends(encoded: Encoded, tokenizer: Tokenizer) -> str | None:
    """A word where answers end with another token than the one that generation stops at."""
    others = encoded.ends.total() - encoded.ends[tokenizer.eod]
    if others == 0:
        return None
    (common, _), *_ = encoded.ends.most_common(1)
    return (
        f"{others} of {encoded.ends.total()} conversations do not end with {tokenizer.eod_token}, "
        f"the end-of-document token, which alone moepp generate stops at; their usual last token "
        f"is {tokenizer.decode([common])!r}: name that one with --eod-token, or end answers with "
        "{{ eos_token }} in the template"
    )
