"""Megatron's own pairs of files, made elsewhere: what of them can be used, and what is reported."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from moepp_megatron.config.blends import Blend, Folder
from moepp_megatron.data.datasets import build_datasets
from moepp_megatron.data.loader import batches
from moepp_megatron.data.prepared_data import check_data
from moepp_megatron.data.tokenizer import train_tokenizer
from moepp_megatron.data.verify import corpus_identity, read_manifest
from tests.refusals import config_error
from tests.unit.training.conftest import config_of


@pytest.fixture
def pair(prepared, tmp_path):
    """The files of a corpus under a name as Megatron's preprocessing gives."""
    prefix = tmp_path / "elsewhere/my_text_document"
    prefix.parent.mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(prepared / f"corpus{suffix}", f"{prefix}{suffix}")
    return prefix


def config(pair, tokenizer, **training):
    data = {"path": str(pair), "tokenizer": None if tokenizer is None else str(tokenizer)}
    return config_of(data=data, model={"vocab_size": 300}, training=training)


def test_it_draws_as_the_prepared_folder(pair, prepared, tokenizer, tmp_path):
    arguments = (tokenizer, 32, "80,20,0", 7, (40, 8, 0))
    ours, theirs = (
        build_datasets(path, *arguments, cache_dir=tmp_path / name)
        for path, name in ((prepared, "a"), (pair, "b"))
    )
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        assert len(mine) == len(other) > 8
        assert all(torch.equal(mine[i]["tokens"], other[i]["tokens"]) for i in range(len(mine)))


def test_it_blends_with_a_prepared_folder(pair, prepared, tokenizer, tmp_path):
    folders = (Folder("a", prepared, 0.5), Folder("b", pair, 0.5))
    blends = [Blend("data.blend", 0, folders)]
    train, _, _ = build_datasets(blends, tokenizer, 32, "80,20,0", 7, (8, 0, 0), cache_dir=tmp_path)
    assert train.source_names == (prepared.name, "my_text_document")


def test_what_cannot_be_checked_is_reported(pair, prepared, tmp_path):
    (warning,) = check_data(config(pair, prepared / "tokenizer.json"))
    assert warning.startswith(f"data.path ({pair}) has no manifest: whether data.tokenizer")
    assert "cannot be checked" in warning
    other = tmp_path / "other.json"
    train_tokenizer(["other words"], 258).save(other)
    content = other.read_text().replace("<|endoftext|>", "<|end_of_text|>")
    other.write_text(content)
    # The end-of-document token is 0 there, too: only other ids can tell.
    assert len(check_data(config(pair, other))) == 1
    tokens = np.fromfile(f"{pair}.bin", np.uint16)
    np.where(tokens == 0, 5, tokens).astype(np.uint16).tofile(f"{pair}.bin")
    _, doubt = check_data(config(pair, prepared / "tokenizer.json"))
    assert "60 of 60 documents looked at do not end with token 0 (<|endoftext|>)" in doubt
    assert "without --append-eod" in doubt


def test_it_needs_a_tokenizer_that_fits_the_model(pair, prepared):
    with config_error(r"data\.tokenizer \(null\) must be given, because"):
        check_data(config(pair, None))
    small = config(pair, prepared / "tokenizer.json")
    small = small.model_copy(update={"model": small.model.model_copy(update={"vocab_size": 100})})
    with config_error(r"model\.vocab_size \(100\) must hold every token of"):
        check_data(small)


def test_a_token_outside_of_the_vocabulary_is_named(pair, tokenizer, tmp_path):
    tokens = np.fromfile(f"{pair}.bin", np.uint16)
    tokens[100:] = 400
    tokens.tofile(f"{pair}.bin")
    train, _, _ = build_datasets(pair, tokenizer, 32, "1,0,0", 7, (8, 0, 0), cache_dir=tmp_path)
    with config_error(r"is damaged, or not of data\.tokenizer: .* is 400"):
        list(batches(train, 0, 4, 0, 1, 8, vocab_size=tokenizer.vocab_size))


def test_its_content_is_its_identity(pair, tmp_path):
    moved = tmp_path / "moved"
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{pair}{suffix}", f"{moved}{suffix}")
    assert corpus_identity(moved) == corpus_identity(pair)
    content = bytearray(Path(f"{moved}.bin").read_bytes())
    content[7] ^= 1
    Path(f"{moved}.bin").write_bytes(content)
    assert corpus_identity(moved) != corpus_identity(pair)


def test_documents_of_several_sentences(tmp_path, tokenizer):
    """Sequences count as documents, as for megatron-core's GPT datasets."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path / "sentences"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in range(6):
        builder.add_document(np.arange(40) + document, [15, 25])
    builder.finalize(f"{prefix}.idx")
    manifest = read_manifest(Folder("data.path", prefix))
    assert (manifest.documents, manifest.tokens) == (12, 240)
    train, _, _ = build_datasets(prefix, tokenizer, 16, "1,0,0", 7, (8, 0, 0), cache_dir=tmp_path)
    assert len(train[0]["tokens"]) == 16


def test_mistakes(pair, prepared, tmp_path):
    for inside in ("corpus", "corpus.bin"):
        with config_error(rf"must be the folder .* wrote; use {prepared}$"):
            read_manifest(Folder("data.path", prepared / inside))
    with config_error(rf"must be the prefix of both files; use {pair}"):
        read_manifest(Folder("data.path", Path(f"{pair}.bin")))
    Path(f"{pair}.idx").write_bytes(b"nonsense")
    with config_error(r"my_text_document\.idx is cut short"):
        read_manifest(Folder("data.path", pair))
    Path(f"{pair}.idx").unlink()
    with config_error("must be a prepared folder"):
        read_manifest(Folder("data.path", pair))


def test_commands(pair, prepared, moepp):
    code, out, err = moepp("data", "show", pair)
    assert code == 0, err
    assert "no manifest: tokenizer, vocabulary and hashes are not known" in out
    assert "these are ids" in out
    assert "Document " in moepp("data", "show", pair, "--tokenizer", prepared)[1]
    assert moepp("data", "verify", pair)[0] == 2
