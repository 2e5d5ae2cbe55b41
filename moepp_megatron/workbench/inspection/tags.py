"""Reads parts of speech from a file or from a tagger that the user has installed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from moepp_megatron.config import ConfigError, UnfitError
from moepp_megatron.config.json_file import parse_json
from moepp_megatron.runtime.install import how_to_install

Tagger = Literal["nltk", "spacy"]

# A word, its tag, and the characters that it takes of the text.
TaggedSpan = tuple[int, int, str]


def read_tags(path: Path, text: str, is_cut: bool) -> list[TaggedSpan]:
    """Tags from a file of words in the order of the text.

    The file is JSON, a list of [word, tag], or lines `word TAB tag` (empty lines and those that
    begin with # are skipped). Between two words the text may have anything. If the text was cut,
    words after its end are left out.

    Raises:
        ConfigError: The file cannot be read, has another form, or does not fit the text.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--pos-tags ({path}) cannot be read ({error}); name a file") from None
    pairs = _json_pairs(content, path) if content.lstrip()[:1] == "[" else _lines(content, path)
    spans, cursor = [], 0
    for place, word, tag in pairs:
        begin = text.find(word, cursor)
        if begin < 0 and is_cut:
            break
        if begin < 0:
            raise ConfigError(
                f"--pos-tags ({path}), {place}: {word!r} must be in the text after the words "
                "before it; tag the same text, in its order"
            )
        cursor = begin + len(word)
        spans.append((begin, cursor, tag))
    if not spans:
        raise ConfigError(
            f"--pos-tags ({path}) must tag at least one word; add lines or leave it out"
        )
    return spans


def run_tagger(tagger: Tagger, text: str) -> list[TaggedSpan]:
    """Tags by an optional package; UnfitError if it or its English model is not installed."""
    return {"nltk": _nltk, "spacy": _spacy}[tagger](text)


def token_tags(spans: Sequence[Sequence[int]], tagged: Iterable[TaggedSpan]) -> list[str | None]:
    """The tag of each token: of the first tagged word that it shares a character with, or None.

    `spans` are the first character of each token and the one after its last, in order.
    """
    tags: list[str | None] = []
    words = list(tagged)
    index = 0
    for begin, end in spans:
        while index < len(words) and words[index][1] <= begin:
            index += 1
        shares = index < len(words) and words[index][0] < end
        tags.append(words[index][2] if shares else None)
    return tags


def _json_pairs(content: str, path: Path) -> list[tuple[str, str, str]]:
    try:
        entries = parse_json(content)
    except ValueError as error:
        raise ConfigError(
            f"--pos-tags ({path}) must be JSON or lines ({error}); correct it"
        ) from None
    pairs = []
    for number, entry in enumerate(entries, start=1):
        if not _is_pair(entry):
            raise ConfigError(
                f"--pos-tags ({path}), entry {number} ({json.dumps(entry)[:40]}) must be "
                '["word", "tag"]; correct it'
            )
        pairs.append((f"entry {number}", entry[0], entry[1]))
    return pairs


def _lines(content: str, path: Path) -> list[tuple[str, str, str]]:
    pairs = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        entry = line.split("\t")
        if not _is_pair(entry):
            raise ConfigError(
                f"--pos-tags ({path}), line {number} ({line[:40]!r}) must be a word, a tab and its "
                "tag; correct it"
            )
        pairs.append((f"line {number}", entry[0], entry[1].strip()))
    return pairs


def _is_pair(entry: object) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and all(isinstance(part, str) and part.strip() for part in entry)
    )


def _nltk(text: str) -> list[TaggedSpan]:
    try:
        import nltk
    except ImportError:
        raise UnfitError(
            "--tagger (nltk) needs the package nltk, which is not installed; "
            f"{how_to_install('nltk')}, or give the tags with --pos-tags FILE"
        ) from None
    try:
        # One call: a tagger reads whole sentences.
        places = list(nltk.tokenize.NLTKWordTokenizer().span_tokenize(text))
        tags = nltk.pos_tag([text[begin:end] for begin, end in places])
    except LookupError:
        raise UnfitError(
            "--tagger (nltk) needs nltk's English tagger, which is not here; run "
            "python -m nltk.downloader averaged_perceptron_tagger_eng, or give the tags with "
            "--pos-tags FILE"
        ) from None
    return [(begin, end, tag) for (begin, end), (_, tag) in zip(places, tags, strict=True)]


def _spacy(text: str) -> list[TaggedSpan]:
    try:
        import spacy
    except ImportError:
        raise UnfitError(
            "--tagger (spacy) needs the package spacy, which is not installed; "
            f"{how_to_install('spacy')}, or give the tags with --pos-tags FILE"
        ) from None
    try:
        pipeline: Any = spacy.load("en_core_web_sm")
    except OSError:
        raise UnfitError(
            "--tagger (spacy) needs its model en_core_web_sm, which is not here; run "
            "python -m spacy download en_core_web_sm, or give the tags with --pos-tags FILE"
        ) from None
    pipeline.max_length = max(pipeline.max_length, len(text))
    return [
        (word.idx, word.idx + len(word.text), word.pos_)
        for word in pipeline(text)
        if word.text.strip()
    ]
