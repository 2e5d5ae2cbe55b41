"""The data source of each token of a sample."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moepp_megatron.data.datasets import build_datasets
from moepp_megatron.data.loader import batches
from moepp_megatron.data.manifest import DOCUMENT_SOURCES, MAX_SOURCES, Manifest
from moepp_megatron.data.prepare import prepare
from moepp_megatron.data.samples import SOURCES, source_names
from moepp_megatron.data.tokenizer import Tokenizer
from tests.refusals import config_error
from tests.unit.data.letters import SETTINGS, write_letters

LENGTH = 24
# Documents of each source are of one letter, so that a token tells where it comes from.
LETTERS = {"first": "a", "second": "b", "third": "c"}


def write_sources(folder):
    """One SOURCE argument for each letter, and one more of the first's name."""
    return [
        f"{name}={write_letters(folder / f'{part}.jsonl', letter, seed=part)}"
        for part, (name, letter) in enumerate([*LETTERS.items(), ("first", "a")])
    ]


@pytest.fixture(scope="module")
def sourced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    out = folder / "data"
    prepare(write_sources(folder), out, SETTINGS)
    return out


def open_training_set(folder, samples):
    tokenizer = Tokenizer.load(folder)
    return build_datasets(folder, tokenizer, LENGTH, "90,10,0", 7, (samples, 0, 0))[0], tokenizer


@pytest.mark.parametrize("workers", [0, 1])
def test_each_token_has_its_source(sourced, workers):
    # More samples than the documents fill: over the end of an epoch, too.
    train, tokenizer = open_training_set(sourced, 300)
    assert source_names(train) == tuple(LETTERS)
    letters = [tokenizer.encode(letter)[0] for letter in LETTERS.values()]
    seen = torch.zeros(3, dtype=torch.int64)
    mixed = 0
    for batch in batches(train, 4, 4, 0, 1, 8, num_workers=workers):
        ids, sources = batch["tokens"], batch[SOURCES]
        assert sources.shape == ids.shape
        assert sources.dtype == torch.int32
        for index, letter in enumerate(letters):
            assert (sources[ids == letter] == index).all()
            seen[index] += (ids == letter).sum()
        # The end of a document belongs to it.
        ends = ids[:, 1:] == tokenizer.eod
        assert torch.equal(sources[:, 1:][ends], sources[:, :-1][ends])
        mixed += sum(len(row.unique()) > 1 for row in sources)
    assert (seen > 200).all()
    assert mixed > 50


def test_the_folder_is_reused_verified_and_refused_when_damaged(sourced, tmp_path, moepp):
    assert prepare(write_sources(sourced.parent), sourced, SETTINGS).up_to_date
    assert moepp("data", "verify", sourced)[0] == 0
    manifest = Manifest.read(sourced)
    assert manifest.source_names == tuple(LETTERS)
    copy = tmp_path / "data"
    copy.mkdir()
    for path in sourced.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    array = np.load(copy / DOCUMENT_SOURCES)
    array[5] = 3
    np.save(copy / DOCUMENT_SOURCES, array)
    with config_error(r"sources\.npy does not give each document one of 3"):
        open_training_set(copy, 8)
    assert moepp("data", "verify", copy)[0] == 2


def test_more_sources_than_records_have_room_for(tmp_path, moepp):
    given = []
    for index in range(MAX_SOURCES + 1):
        (tmp_path / f"{index}.txt").write_text(f"text {index}")
        given.append(tmp_path / f"{index}.txt")
    options = ("--out", tmp_path / "data", "--vocab-size", "258", "--workers", "1")
    code, out, err = moepp("data", "prepare", *given, *options)
    assert code == 0, err
    assert "data sources: 65, and runs have metrics of 64 at most" in out
    assert not (tmp_path / "data" / DOCUMENT_SOURCES).exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [("=text.txt", "must have a name before ="), ("name=", "must not be empty")],
)
def test_a_source_without_name_or_path(tmp_path, given, message):
    with config_error(message):
        prepare([given], tmp_path / "out", SETTINGS)


def test_a_path_with_the_sign_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a=b.txt").write_text("some text")
    manifest = prepare("a=b.txt", tmp_path / "out", SETTINGS).manifest
    assert manifest.source_names == ("a=b.txt",)
