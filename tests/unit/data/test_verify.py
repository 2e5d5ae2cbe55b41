import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moepp_megatron.config.blends import Folder
from moepp_megatron.data.manifest import Manifest
from moepp_megatron.data.verify import check_start, read_manifest, verify
from tests.refusals import config_error, config_line

from .conftest import VOCAB_SIZE

HEADER_BYTES = 34


@pytest.fixture
def folder(prepared, tmp_path):
    return Path(shutil.copytree(prepared, tmp_path / "dataset"))


def lengths_of(folder):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(folder / "corpus"))
    return np.array(dataset.sequence_lengths)


def change_bytes(path, offset, data):
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def change_manifest(folder, **values):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def problems(folder):
    states = verify(folder, Manifest.read(folder), lambda size: None)
    return {state.name: state.problem for state in states if state.problem}


def spoil_token(folder, document, offset, value):
    place = int(lengths_of(folder)[:document].sum()) + offset
    change_bytes(folder / "corpus.bin", 2 * place, np.uint16(value).tobytes())


def test_intact_folder(folder, moepp):
    read = []
    manifest = Manifest.read(folder)
    states = verify(folder, manifest, read.append)
    assert all(state.compared and not state.problem for state in states)
    assert sum(read) == sum(manifest.files.values())
    check_start(Folder("DIR", folder), manifest, whole_index=True)
    code, out, err = moepp("data", "verify", folder)
    assert code == 0, err
    assert "intact, 60 documents" in out
    assert "verify: " in out, "progress"
    assert "no hashes" not in out


@pytest.mark.parametrize("name", ["corpus.bin", "corpus.idx", "tokenizer.json"])
def test_every_changed_byte_is_found(folder, name):
    path = folder / name
    for offset in (0, path.stat().st_size // 2, path.stat().st_size - 1):
        data = path.read_bytes()
        change_bytes(path, offset, bytes([data[offset] ^ 1]))
        assert list(problems(folder)) == [name]
        assert "holds other bytes than were written" in problems(folder)[name]
        path.write_bytes(data)
    assert problems(folder) == {}


def test_token_outside_of_the_vocabulary_is_named_by_document_and_place(folder, monkeypatch):
    # Chunks that end within documents and within what the test looks for.
    monkeypatch.setattr("moepp_megatron.data.verify._CHUNK_BYTES", 64)
    for document, offset in [(0, 0), (17, 0), (17, 5), (59, int(lengths_of(folder)[59]) - 1)]:
        before = (folder / "corpus.bin").read_bytes()
        spoil_token(folder, document, offset, 60_001)
        assert problems(folder)["corpus.bin"].endswith(
            f"token {offset} of document {document} is 60001, outside of the vocabulary "
            f"(0 to {VOCAB_SIZE - 1})"
        )
        (folder / "corpus.bin").write_bytes(before)


def test_folder_of_an_earlier_version_is_checked_as_far_as_possible(folder, moepp):
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("sha256", "split"):
        del manifest[name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    code, out, err = moepp("data", "verify", folder)
    assert code == 0, err
    assert "no hashes: an earlier version" in out
    spoil_token(folder, 3, 1, VOCAB_SIZE)
    assert problems(folder) == {
        "corpus.bin": f"token 1 of document 3 is {VOCAB_SIZE}, outside of the vocabulary "
        f"(0 to {VOCAB_SIZE - 1})"
    }


def test_damage_is_one_line_and_exit_code_2(folder, moepp):
    spoil_token(folder, 3, 1, 60_001)
    change_bytes(folder / "corpus.idx", 40, b"\xff")
    code, out, err = moepp("data", "verify", str(folder))
    assert code == 2
    assert err.count("\n") == 1
    assert f"error: DIR ({folder}) is damaged: corpus.idx is wrong about document 2" in err
    assert "corpus.bin holds other bytes than were written" in err
    assert "tokenizer.json" in out


def set_count(folder, count):
    change_bytes(folder / "corpus.idx", 18, count.to_bytes(8, "little"))


# What a header shows, and what the whole index shows.
HEADER_DAMAGES = {
    "no bin": (lambda f: (f / "corpus.bin").unlink(), "corpus.bin is missing"),
    "no idx": (lambda f: (f / "corpus.idx").unlink(), "corpus.idx is missing"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "bin cut": (lambda f: (f / "corpus.bin").write_bytes(b"x"), "corpus.bin has 1 bytes where"),
    "magic": (lambda f: change_bytes(f / "corpus.idx", 0, b"X"), "corpus.idx is no index"),
    "version": (lambda f: change_bytes(f / "corpus.idx", 9, b"X"), "corpus.idx is no index"),
    "dtype": (lambda f: change_bytes(f / "corpus.idx", 17, b"\1"), "corpus.idx is no index"),
    "count": (lambda f: set_count(f, 2**60), "counts 1152921504606846976 documents where"),
    "manifest": (lambda f: change_manifest(f, documents=59), "counts 60 documents where"),
}
INDEX_DAMAGES = {
    "length": (
        lambda f: change_bytes(f / "corpus.idx", HEADER_BYTES + 4 * 7, b"\xff"),
        "wrong about document",
    ),
    "negative": (
        lambda f: change_bytes(f / "corpus.idx", HEADER_BYTES + 4 * 7 + 3, b"\xff"),
        "wrong about document 7",
    ),
    "start": (
        lambda f: change_bytes(f / "corpus.idx", HEADER_BYTES + 4 * 60 + 8 * 9 + 4, b"\xff"),
        "wrong about document 9",
    ),
    "boundary": (
        lambda f: change_bytes(f / "corpus.idx", HEADER_BYTES + 12 * 60 + 8 * 3, b"\0"),
        "wrong about which sequences are documents",
    ),
}


@pytest.mark.parametrize("damage", [*HEADER_DAMAGES, *INDEX_DAMAGES])
def test_damage_is_found_before_training(folder, damage):
    spoil, words = (HEADER_DAMAGES | INDEX_DAMAGES)[damage]
    spoil(folder)
    named = Folder("data.path", folder)
    with config_line(words) as caught:
        check_start(named, read_manifest(named), whole_index=True)
    assert str(caught.value).startswith(f"data.path ({folder}) is damaged: ")
    assert str(caught.value).endswith(f"moepp data verify {folder}")
    if damage in HEADER_DAMAGES:
        with config_error(words):
            check_start(named, read_manifest(named))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        *({"vocab_size": size} for size in ("4", True)),
        *({"documents": -1}, {"tokens": "9"}, {"eod_token": 1}, {"tokenizer_sha256": None}),
        *({"files": files} for files in ({"../x": 1}, {"corpus.bin": 1}, [])),
        *({"sha256": digests} for digests in (3, {"corpus.bin": 5})),
        *({"skipped_reasons": {"empty": []}}, {"sources": [{"name": 1}]}),
        {"inputs": {"settings": [], "content_sha256": "", "stat_sha256": ""}},
    ],
    ids=str,
)
def test_damaged_manifest_is_one_line(folder, content):
    if isinstance(content, dict):
        change_manifest(folder, **content)
    else:
        (folder / "manifest.json").write_text(content)
    with config_line(r"data\.path .* must be a prepared folder \("):
        read_manifest(Folder("data.path", folder))


@pytest.mark.parametrize(("document", "workers"), [(0, 0), (23, 2), (59, 0)])
def test_loader_names_a_token_outside_of_the_vocabulary(folder, document, workers):
    from moepp_megatron.data.datasets import build_datasets
    from moepp_megatron.data.loader import batches, vocabulary_of
    from moepp_megatron.data.tokenizer import Tokenizer
    from moepp_megatron.features.tokens.part import _token_counts

    offset = int(lengths_of(folder)[document]) // 2
    # The model would take it; the tokenizer does not have it.
    spoil_token(folder, document, offset, VOCAB_SIZE)
    place = f"token {offset} of document {document} is {VOCAB_SIZE}, outside of the vocabulary"
    train, _, _ = build_datasets(folder, Tokenizer.load(folder), 8, "1,0,0", 1, (1, 0, 0))
    assert vocabulary_of(train, 4096) == VOCAB_SIZE
    assert vocabulary_of(object(), 4096) == 4096

    def read():
        loaded = batches(train, 0, 2, 0, 1, 2, num_workers=workers, vocab_size=VOCAB_SIZE)
        return sum(1 for _ in loaded)

    with config_line(place) as caught:
        read()
    assert str(caught.value).startswith(f"data.path ({folder}) is damaged: ")
    with config_error(place):
        _token_counts(train, VOCAB_SIZE)


def test_label_behind_the_last_token_is_checked():
    import torch

    from moepp_megatron.data.loader import check_tokens

    good = {"tokens": torch.tensor([[0, 1], [2, 3]]), "labels": torch.tensor([[1, 2], [3, 4]])}
    check_tokens(None, [7, 8], good, 5)
    with pytest.raises(ValueError, match="token 2 of sample 8 is 4, outside"):
        check_tokens(None, [7, 8], good, 4)
    with pytest.raises(ValueError, match="token 1 of sample 7 is -2, outside"):
        check_tokens(None, [7], {"tokens": torch.tensor([[0, -2]])}, 5)
