import dataclasses
import gzip
import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import tokenizers
from pyarrow import parquet

from moepp_megatron.config.errors import UnfitError
from moepp_megatron.data import documents
from moepp_megatron.data import prepare as prepare_module
from moepp_megatron.data.manifest import Manifest
from moepp_megatron.data.prepare import PrepareSettings, prepare
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.runtime.atomic import partial_folder
from moepp_megatron.runtime.terminal import Console
from tests.full_disk import fill
from tests.refusals import config_error

from .conftest import VOCAB_SIZE, stored_texts

SMALL = PrepareSettings(VOCAB_SIZE, workers=1)
FORCE = dataclasses.replace(SMALL, force=True)


@pytest.fixture
def make(corpus_file):
    """Prepares a folder."""
    return lambda out, settings=SMALL, source=corpus_file: prepare(source, out, settings)


@pytest.fixture
def source(corpus_file, tmp_path):
    """A file of texts to change."""
    return shutil.copy(corpus_file, tmp_path / "corpus.jsonl")


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def mtimes(folder):
    return {path.name: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}


def test_stored_documents_are_the_texts(prepared, texts):
    stored = stored_texts(prepared)
    assert sorted(stored) == sorted(texts)
    assert stored != texts, "documents must be shuffled, for an unbiased validation split"


def test_manifest_tells_the_truth(prepared, texts, tokenizer):
    values = json.loads((prepared / "manifest.json").read_text())
    ids = [tokenizer.encode(text) for text in texts]
    assert values["format_version"] == 1
    assert values["documents"] == len(texts)
    assert values["skipped"] == 0
    assert values["tokens"] == sum(len(document) + 1 for document in ids)
    assert values["vocab_size"] == tokenizer.vocab_size == VOCAB_SIZE
    assert values["eod_id"] == tokenizer.eod
    assert values["tokenizer_sha256"] == digests(prepared)["tokenizer.json"]
    # 2 bytes per token: the vocabulary fits uint16.
    assert (prepared / "corpus.bin").stat().st_size == 2 * values["tokens"]
    assert {path.name for path in prepared.iterdir()} == {
        "corpus.bin",
        "corpus.idx",
        "tokenizer.json",
        "manifest.json",
    }


def test_sources_of_all_kinds_are_counted_apart(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.md").write_text("# a heading")
    (folder / "b.txt").write_bytes(b"\xff\xfe")
    (folder / "c.txt").write_text("")
    (tmp_path / "l.jsonl").write_text('{"text": "a line"}\n{"text": " "}\n')
    parquet.write_table(pyarrow.table({"text": ["a row", "another"]}), tmp_path / "p.parquet")
    names = [str(tmp_path / name) for name in ("folder", "l.jsonl", "p.parquet")]
    manifest = prepare(names, tmp_path / "out", SMALL).manifest
    assert [(s.name, s.documents, s.skipped) for s in manifest.sources] == [
        (names[0], 1, 2),
        (names[1], 1, 1),
        (names[2], 2, 0),
    ]
    assert sum(source.tokens for source in manifest.sources) == manifest.tokens
    assert (manifest.documents, manifest.skipped) == (4, 3)
    assert manifest.skipped_reasons == {"empty": 2, "not UTF-8 text": 1}
    assert sorted(stored_texts(tmp_path / "out")) == ["# a heading", "a line", "a row", "another"]


def test_bytes_do_not_depend_on_the_number_of_workers(make, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 500)
    for workers in (1, 2):
        make(tmp_path / str(workers), PrepareSettings(VOCAB_SIZE, workers=workers))
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


def test_same_inputs_are_not_prepared_again(make, source, tmp_path):
    out = tmp_path / "out"
    assert not make(out, source=source).up_to_date
    before = mtimes(out)
    again = make(out, PrepareSettings(VOCAB_SIZE, workers=2), source)
    assert again.up_to_date
    assert again.manifest == Manifest.read(out)
    source.touch()
    assert make(out, source=source).up_to_date, "only the time changed"
    assert mtimes(out) == before


def test_other_inputs_are_refused_without_force(make, source, tmp_path):
    out = tmp_path / "out"
    make(out, source=source)
    before = digests(out)
    with config_error(r"seed is 1234, not 5\); pass --force"):
        make(out, PrepareSettings(VOCAB_SIZE, seed=5), source)
    source.write_text('{"text": "something else"}\n')
    with config_error(r"the sources differ\); pass --force"):
        make(out, source=source)
    assert digests(out) == before
    make(out, FORCE, source)
    assert stored_texts(out) == ["something else"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "out"]


def test_another_split_is_another_corpus(prepared):
    manifest = Manifest.read(prepared)
    assert manifest.split is None
    identities = {dataclasses.replace(manifest, split=s).identity for s in (None, "1,1,0", "2,1,0")}
    assert len(identities) == 3


def test_files_without_a_checksum_are_named(tmp_path):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(pyarrow.compress(b"words and lines " * 99, "zstd", asbytes=True))
    told = io.StringIO()
    prepare(path, tmp_path / "out", SMALL, Console(file=told, width=300))
    assert f"files without a checksum (1, such as {path}): damage in them" in told.getvalue()


def test_damaged_folder_is_noticed(make, tmp_path):
    out = tmp_path / "out"
    make(out)
    (out / "corpus.bin").write_bytes(b"short")
    with config_error(r"damaged.*; pass --force"):
        make(out)
    (out / "manifest.json").write_text("{}")
    with config_error(r"manifest is unusable.*; pass --force"):
        make(out)
    make(out, FORCE)
    assert make(out).up_to_date


@pytest.mark.parametrize("settings", [SMALL, FORCE], ids=["plain", "force"])
@pytest.mark.parametrize("with_manifest", [False, True])
def test_foreign_files_are_never_removed(make, tmp_path, settings, with_manifest):
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    if with_manifest:
        (out / "manifest.json").write_text("{}")
    with config_error(r"holds thesis\.tex; choose another"):
        make(out, settings)
    assert (out / "thesis.tex").read_text() == "years of work"
    with config_error("must be a folder, but is a file"):
        make(out / "thesis.tex", settings)


@pytest.mark.parametrize("step", ["_make_tokenizer", "write_indexed_dataset", "publish"])
def test_interrupted_run_leaves_nothing_behind(make, tmp_path, monkeypatch, step):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    old = tmp_path / "old"
    make(old)
    before = digests(old)
    monkeypatch.setattr(prepare_module, step, interrupt)
    for out in (old, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            make(out, FORCE)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert digests(old) == before


def test_leftovers_of_a_killed_run_do_no_harm(make, prepared, tmp_path):
    (tmp_path / ".out.partial/junk").mkdir(parents=True)
    (tmp_path / ".out.partial/corpus.bin").write_text("half")
    make(tmp_path / "out")
    found = digests(tmp_path / "out")
    assert found == digests(prepared) | {"manifest.json": found["manifest.json"]}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_runs_do_not_write_one_folder(make, tmp_path):
    out = tmp_path / "out"
    with partial_folder(out), config_error("being written by another process"):
        make(out)
    assert not make(out).up_to_date


def test_existing_tokenizer_is_used(make, prepared, tmp_path):
    file = prepared / "tokenizer.json"
    out = tmp_path / "out"
    manifest = make(out, PrepareSettings(tokenizer=file)).manifest
    assert (out / "tokenizer.json").read_bytes() == file.read_bytes()
    assert (out / "corpus.bin").read_bytes() == (prepared / "corpus.bin").read_bytes()
    assert manifest.inputs.settings["tokenizer"] == manifest.tokenizer_sha256
    with config_error("already holds another dataset"):
        make(out)


def test_chosen_end_of_document_token_is_remembered(make, tmp_path):
    vocab = {"a": 0, "</s>": 1, "<stop>": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.add_special_tokens(["</s>", "<stop>"])
    backend.save(str(tmp_path / "other.json"))
    (tmp_path / "a.txt").write_text("aa")
    out = tmp_path / "out"
    settings = PrepareSettings(tokenizer=tmp_path / "other.json", eod_token="<stop>")
    manifest = make(out, settings, tmp_path / "a.txt").manifest
    assert (manifest.eod_id, manifest.tokens) == (2, 3)
    assert Tokenizer.load(out).eod == Tokenizer.load(out / "tokenizer.json").eod == 2
    assert Tokenizer.load(tmp_path / "other.json").eod == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"workers": 0}, r"--workers \(0\) must be at least 1"),
        ({"seed": -1}, r"--seed \(-1\) must be between 0"),
        ({"vocab_size": 100}, r"--vocab-size \(100\) must be at least 257"),
        ({"vocab_size": 10**11}, r"--vocab-size \(100000000000\) must be at most 10000000; use"),
        ({"vocab_size": 999, "tokenizer": Path("t.json")}, r"--vocab-size \(999\) cannot be comb"),
        ({"eod_token": "</s>"}, r"--eod-token \(</s>\) needs --tokenizer"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with config_error(message):
        PrepareSettings(**values)


def test_wide_vocabulary_is_stored_in_32_bits(make, tmp_path):
    vocab = {f"w{i}": i for i in range(70_000)} | {"<|endoftext|>": 70_000}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "wide.json"))
    (tmp_path / "a.txt").write_text("w1 w69999")
    out = tmp_path / "out"
    make(out, PrepareSettings(tokenizer=tmp_path / "wide.json"), tmp_path / "a.txt")
    # The last is the end of the document.
    assert np.fromfile(out / "corpus.bin", np.int32).tolist() == [1, 69_999, 70_000]


# The tokenizer, the spooled tokens, the dataset, its index: whatever is being written.
@pytest.mark.parametrize("room", [0, 4096, 12288, 16384, 20480])
def test_a_full_disk_is_one_line(make, small_disk, room):
    fill(small_disk, leave=room)
    with pytest.raises(UnfitError, match=r"out cannot be written: No space left on device"):
        make(small_disk / "out")
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]
    (small_disk / "ballast").unlink()
    assert not make(small_disk / "out").up_to_date


def test_what_is_too_long_to_be_tokenized_whole_is_left_out(make, tmp_path, monkeypatch):
    """Whatever it is packed in, since a text of one letter packs to a thousandth."""
    monkeypatch.setattr("moepp_megatron.data.tokenizer.MAX_PIECE_CHARACTERS", 1000)
    vocab = {"a": 0, "<|endoftext|>": 1}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [])).save(str(tmp_path / "whole.json"))
    whole = PrepareSettings(tokenizer=tmp_path / "whole.json", workers=1, force=True)
    line = json.dumps({"text": "a" * 1001}).encode() + b"\n"
    for name, content in (
        ("a.txt", b"a" * 1001),
        ("b.txt.gz", gzip.compress(b"a" * 1001)),
        ("c.jsonl.gz", gzip.compress(line)),
    ):
        (tmp_path / name).write_bytes(content)
        with config_error("cannot be cut: 1.; cut it into several documents"):
            make(tmp_path / "out", whole, tmp_path / name)
    (tmp_path / "d.jsonl").write_bytes(line + json.dumps({"text": "a" * 1000}).encode())
    manifest = make(tmp_path / "out", whole, tmp_path / "d.jsonl").manifest
    assert (manifest.documents, manifest.skipped, manifest.tokens) == (1, 1, 1001)


def test_a_worker_without_memory_is_one_line(make, tmp_path, monkeypatch):
    """The kernel ends a process that has taken all memory, and there is no exception."""
    from moepp_megatron.data import encoding

    (tmp_path / "a.jsonl").write_text((json.dumps({"text": "text"}) + "\n") * 50_000)
    submit = encoding.ProcessPoolExecutor.submit

    def killed(self, function, *arguments):
        return submit(self, os._exit, 9)

    monkeypatch.setattr(encoding.ProcessPoolExecutor, "submit", killed)
    with pytest.raises(UnfitError, match=r"a.jsonl was ended .* use fewer --workers"):
        make(tmp_path / "out", PrepareSettings(VOCAB_SIZE, workers=2), tmp_path / "a.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
