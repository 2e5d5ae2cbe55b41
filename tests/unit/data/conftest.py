"""A small corpus, prepared once."""

import json

import pyarrow as pa
import pytest

from moepp_megatron.data.documents import plan_pieces
from moepp_megatron.data.prepare import PrepareSettings, prepare
from moepp_megatron.data.sources import resolve_sources
from moepp_megatron.data.tokenizer import Tokenizer

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


def pieces_of(path, text_key="text"):
    return plan_pieces(resolve_sources([str(path)]), text_key)


def read_all(path, text_key="text"):
    """The documents of a source, and the reasons why others are none."""
    return [each for piece in pieces_of(path, text_key) for each in piece.documents(text_key)]


def stored_texts(folder):
    """The documents in their order."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenizer = Tokenizer.load(folder)
    dataset = IndexedDataset(str(folder / "corpus"))
    texts = []
    for ids in (dataset[i] for i in range(len(dataset))):
        assert ids[-1] == tokenizer.eod
        assert tokenizer.eod not in ids[:-1]
        texts.append(tokenizer.decode(ids[:-1]))
    return texts


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
    prepare([str(corpus_file)], out, settings)
    return out


@pytest.fixture(scope="session")
def tokenizer(prepared):
    return Tokenizer.load(prepared)
