"""A small corpus, prepared once."""

import json

import pyarrow as pa
import pytest

from moepp_megatron.data.prepare import PrepareSettings, prepare
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.runtime.terminal import Console

VOCAB_SIZE = 300


def make_texts(count):
    """Distinct texts of different lengths, none of them part of another."""
    return [
        f"Document {i}: " + f"na\u00efve \u2116 {i} w\u00f6rds and\n\tlines; " * (i % 7 + 1)
        for i in range(count)
    ]


def write_arrow(path, table, new=pa.ipc.new_stream, **options):
    """An Arrow stream or file; `options` are those of `write_table`."""
    with new(str(path), table.schema) as writer:
        writer.write_table(table, **options)


@pytest.fixture
def console():
    return Console(quiet=True)


@pytest.fixture(scope="session")
def texts():
    return make_texts(60)


@pytest.fixture(scope="session")
def corpus_file(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def prepared(corpus_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "dataset"
    settings = PrepareSettings(vocab_size=VOCAB_SIZE, workers=1)
    prepare([str(corpus_file)], out, settings, Console(quiet=True))
    return out


@pytest.fixture(scope="session")
def tokenizer(prepared):
    return Tokenizer.load(prepared)
