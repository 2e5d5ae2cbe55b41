"""Conversations as a prepared folder: encoded, put whole into sequences, with a mark a token."""

import hashlib
import json
import shlex
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.data.chat_template import ANSWERS, ChatTemplate, Message, UnusableChat
from moepp_megatron.data.corpus import WrittenCorpus, spool_corpus, write_documents
from moepp_megatron.data.documents import Piece, Record, Skipped, is_utf8
from moepp_megatron.data.encoding import EncodedPiece, count_skipped, token_dtype
from moepp_megatron.data.manifest import CORPUS, MARKS, Conversations
from moepp_megatron.data.progress import track
from moepp_megatron.data.sources import TextSource
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.file_names import CHAT_TEMPLATE_FILE
from moepp_megatron.runtime.terminal import Console

FORMS = (
    '{"messages": [{"role": "user", "content": "..."}, ...]}, '
    '{"conversations": [{"from": "human", "value": "..."}, ...]} or '
    '{"instruction": "...", "input": "...", "output": "..."}'
)
_ROLES = ("system", "developer", "user", ANSWERS, "tool")
# ShareGPT's names, as LLaMA-Factory and axolotl read them.
_SHAREGPT_ROLES = {"human": "user", "gpt": ANSWERS, "chatgpt": ANSWERS, "observation": "tool"}


def _messages_of(record: Record) -> list[Message]:
    """Return the messages of a record; raise UnusableChat if they cannot be trained on."""
    messages = _messages(record)
    if not isinstance(messages, list) or not messages:
        raise UnusableChat("no messages, conversations, or instruction and output")
    if record.get("tools"):
        raise UnusableChat("tools, which templates are not given here")
    if not is_utf8(json.dumps(messages, ensure_ascii=False)):
        raise UnusableChat("a message is not UTF-8 text")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UnusableChat("a message without text as its content")
        if message.get("role") not in _ROLES:
            raise UnusableChat(f"a role other than {', '.join(_ROLES)}")
    answers = [message["content"] for message in messages if message["role"] == ANSWERS]
    if not answers:
        raise UnusableChat(f"no message of the role {ANSWERS}")
    if not all(answer.strip() for answer in answers):
        raise UnusableChat("an empty answer")
    return messages


def _messages(record: Record) -> Any:
    """Return the messages, unchecked; None if the record has none of the forms."""
    if "messages" in record:
        return record["messages"]
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    turns = record.get("conversations")
    if isinstance(turns, list):
        return system + [_turn(each) for each in turns]
    if "instruction" in record and "output" in record:
        return system + _alpaca(record)
    return None


def _turn(turn: Any) -> Any:
    """A message of ShareGPT's `from` and `value`."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    name = turn["from"]
    role = _SHAREGPT_ROLES.get(name, name) if isinstance(name, str) else name
    return {"role": role, "content": turn.get("value")}


def _alpaca(record: Record) -> list[Any]:
    """Questions and answers before, and the record's: LLaMA-Factory joins its parts so, too."""
    asked = [part for part in (record["instruction"], record.get("input")) if part]
    is_text = all(isinstance(part, str) for part in asked)
    before = record.get("history") or []
    is_history = isinstance(before, list) and all(
        isinstance(pair, list) and len(pair) == 2 for pair in before
    )
    pairs = [*(before if is_history else [(None, None)])]
    pairs.append(("\n".join(asked) if is_text else None, record["output"]))
    return [
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", ANSWERS), pair, strict=True)
    ]


def check_formats(sources: Sequence[TextSource]) -> None:
    """Raise ConfigError for the first file that holds no records."""
    for file in (file for source in sources for file in source.files):
        if file.format == "text":
            raise ConfigError(
                f"source {file.path} must be JSONL (.jsonl, .ndjson) or parquet with --chat, with "
                f"a line for each conversation: {FORMS}; rename it, or convert an array of JSON: "
                f"jq -c '.[]' {shlex.quote(str(file.path))} > FILE.jsonl"
            )


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

    What cannot be used, or is longer than `sequence_length` tokens, is counted by reason. A source
    without a single usable conversation raises ConfigError.
    """
    tokenizer = template.tokenizer
    with track(console, "encode", sum(piece.size for piece in pieces)) as advance:
        encoded = _encode(pieces, template, sequence_length)
        path = folder / "spool"
        spooled = spool_corpus(encoded, sources, np.int32, path, advance, _nothing_usable)
    codes = np.asarray(np.memmap(path, np.int32, mode="r"))
    conversations = np.split(codes, spooled.lengths.cumsum()[:-1])
    # The last token of answers, by how often.
    ends, answer_tokens = Counter[int](), 0
    for own in conversations:
        answers = own[own & 1 == 1]
        ends[int(answers[-1]) >> 1] += 1
        answer_tokens += len(answers)
    _note_ends(ends, tokenizer, console)
    sequences, hashes = _write_sequences(conversations, tokenizer, sequence_length, folder, seed)
    path.unlink()
    text = template.text.encode()
    (folder / CHAT_TEMPLATE_FILE).write_bytes(text)
    hashes |= {CHAT_TEMPLATE_FILE: hashlib.sha256(text).hexdigest()}
    tokens = sequences * sequence_length
    return WrittenCorpus(
        spooled.sources,
        spooled.skipped,
        sequences,
        tokens,
        hashes,
        chat=Conversations(
            sequence_length=sequence_length,
            conversations=len(conversations),
            answer_tokens=answer_tokens,
            padding_tokens=tokens - len(codes),
        ),
    )


def _encode(
    pieces: Sequence[Piece], template: ChatTemplate, sequence_length: int
) -> Iterator[EncodedPiece]:
    """Encode conversations: twice the id of each token, plus 1 where it is learnt."""
    for piece in pieces:
        codes, skipped = [np.empty(0, np.int32)], Counter[str]()
        for record in (r for part in piece.parts for r in part.records()):
            try:
                if isinstance(record, Skipped):
                    raise UnusableChat(record.reason)
                ids, is_learnt = template.encode(_messages_of(record))
                if len(ids) > sequence_length:
                    raise UnusableChat(f"longer than {sequence_length} tokens, the --seq-length")
            except UnusableChat as error:
                count_skipped(skipped, {str(error): 1})
                continue
            codes.append((2 * np.array(ids, np.int32) + is_learnt).astype(np.int32))
        lengths = np.array([len(each) for each in codes[1:]], np.int64)
        yield EncodedPiece(piece, np.concatenate(codes), lengths, skipped)


def _nothing_usable(source: TextSource, skipped: Counter[str]) -> ConfigError:
    reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.most_common(4))
    return ConfigError(
        f"source {source.name} has no usable conversation ({reasons or 'no records'}); each line "
        f"must be {FORMS}, with an answer, and fit into --seq-length"
    )


def _note_ends(ends: Counter[int], tokenizer: Tokenizer, console: Console) -> None:
    """Say where answers end with another token than the one that generation stops at."""
    others = ends.total() - ends[tokenizer.eod]
    if others:
        (common, _), *_ = ends.most_common(1)
        console.print_line(
            f"note: {others} of {ends.total()} conversations do not end with "
            f"{tokenizer.eod_token}, the end-of-document token, the only one at which moepp "
            f"generate stops; their usual last token is {tokenizer.decode([common])!r}: name that "
            "one with --eod-token, or end answers with {{ eos_token }} in the template"
        )


def _write_sequences(
    conversations: Sequence[NDArray[np.int32]],
    tokenizer: Tokenizer,
    sequence_length: int,
    folder: Path,
    seed: int,
) -> tuple[int, dict[str, str]]:
    """Write corpus and marks with megatron-core's builder; their number, and SHA-256 by name."""
    from moepp_megatron.data.samples import FIRST, PADDED

    # RandomState, because NumPy promises its stream across versions.
    random = np.random.RandomState(seed)
    lengths = [len(each) for each in conversations]
    packs = _pack(lengths, random.permutation(len(lengths)), sequence_length)
    # Once more: the sequences for validation are the last ones, those with the most padding.
    order = random.permutation(len(packs))
    dtype = token_dtype(tokenizer.vocab_size)

    def sequences() -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        for number in order:
            tokens = np.full(sequence_length, tokenizer.eod, dtype)
            marks = np.full(sequence_length, PADDED, np.uint8)
            start = 0
            for index in packs[number]:
                own = conversations[index]
                tokens[start : start + len(own)] = own >> 1
                # The lowest bit of a code is `samples.LEARNT`.
                marks[start : start + len(own)] = own & 1
                marks[start] |= FIRST
                start += len(own)
            if start < sequence_length:
                marks[start] |= FIRST
            yield tokens, marks

    hashes = write_documents(folder / CORPUS, (tokens for tokens, _ in sequences()), dtype)
    hashes |= write_documents(folder / MARKS, (marks for _, marks in sequences()), np.uint8)
    return len(packs), hashes


def _pack(lengths: Sequence[int], order: NDArray[np.int64], room: int) -> list[list[int]]:
    """Put each conversation, in this order, into the fullest sequence with room for it."""
    packs: list[list[int]] = []
    # Tokens left, and the sequence.
    spaces: list[tuple[int, int]] = []
    for index in order.tolist():
        place = bisect_left(spaces, (lengths[index], -1))
        if place == len(spaces):
            packs.append([])
            space, number = room, len(packs) - 1
        else:
            space, number = spaces.pop(place)
        packs[number].append(index)
        if space > lengths[index]:
            insort(spaces, (space - lengths[index], number))
    return packs
