"""A tokenizer must be the corpus's and the model's, not one of equal size."""

import json
import shutil

import pytest

from moepp_megatron.config.blends import Folder
from moepp_megatron.data.manifest import Manifest
from moepp_megatron.data.prepared_data import (
    _check_corpus_tokenizer,
    check_model_tokenizer,
    tokenizer_of_run,
)
from moepp_megatron.data.tokenizer import Tokenizer, train_tokenizer
from tests.refusals import config_error, refusal
from tests.unit.training.conftest import config_of


@pytest.fixture
def folder(prepared, tmp_path):
    """A prepared folder to do harm to."""
    return shutil.copytree(prepared, tmp_path / "data")


@pytest.fixture
def other(prepared, tmp_path):
    """Another tokenizer of the same size, with the same end-of-document token."""
    size = Tokenizer.load(prepared).vocab_size
    tokenizer = train_tokenizer(["quite other words " * 50 + "for other merges " * 50] * 9, size)
    assert tokenizer.vocab_size <= size
    tokenizer.save(tmp_path / "other.json")
    return tmp_path / "other.json"


def _rewritten(file, target):
    """The same tokenizer, written down differently."""
    target.write_text(json.dumps(json.loads(file.read_text()), indent=None))
    assert target.read_bytes() != file.read_bytes()
    return target


def _config(folder, tokenizer=None):
    return config_of(
        data={"path": str(folder), "tokenizer": None if tokenizer is None else str(tokenizer)}
    )


def _check(folder, tokenizer=None):
    place = Folder("data.path", folder)
    _check_corpus_tokenizer(_config(folder, tokenizer), Manifest.read(folder), place)


def test_the_corpus_has_its_own(folder, tmp_path):
    _check(folder)
    moved = folder.rename(tmp_path / "moved")
    _check(moved)
    _check(moved, shutil.copy(moved / "tokenizer.json", tmp_path / "copy.json"))
    _check(moved, moved)
    _check(moved, _rewritten(moved / "tokenizer.json", tmp_path / "rewritten.json"))


def test_another_one_is_refused_with_both_hashes(folder, other):
    digest = Manifest.read(folder).tokenizer_sha256[:16]
    (line,) = refusal(_check, folder, other).splitlines()
    assert line.startswith(f"data.tokenizer ({other}, SHA-256 ")
    assert f"must be the one that data.path ({folder}) was tokenized with (SHA-256 {digest}" in line
    assert f"leave data.tokenizer out, or prepare the text again with --tokenizer {other}" in line


def test_another_end_of_document_is_refused(folder, tmp_path):
    """Of the same tokenizer: by another --eod-token, or by the file that names it."""
    other = shutil.copytree(folder, tmp_path / "other")
    content = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(content | {"eod_id": 5, "eod_token": "%"}))
    blend = [{"path": str(each), "weight": 1.0} for each in (folder, other)]
    message = r"\(.*other\) must end documents with <.endoftext.>, .* and ends them with %"
    with config_error(rf"data\.blend\[1\]\.path {message}"):
        _check_corpus_tokenizer(
            config_of(data={"blend": blend}),
            Manifest.read(other),
            Folder("data.blend[1].path", other),
        )
    _check(other)
    with config_error(rf"data\.path {message}"):
        _check(other, shutil.copy(folder / "tokenizer.json", tmp_path / "copy.json"))


def test_another_one_in_the_folder_is_refused(folder, other):
    shutil.copy(other, folder / "tokenizer.json")
    with config_error(r"data\.path .* must hold the tokenizer\.json that its"):
        _check(folder)
    # The folder no longer has what another file could be compared with.
    with config_error(r"data\.tokenizer .* must be the one"):
        _check(folder, other)


@pytest.mark.parametrize("content", [None, b"{}", b"version https://git-lfs.github.com/spec/v1"])
def test_what_is_no_tokenizer_is_refused(folder, tmp_path, content):
    file = tmp_path / "none.json"
    if content is not None:
        file.write_bytes(content)
    with config_error(r"tokenizer \(.*none\.json\) (cannot be read|must be a)"):
        _check(folder, file)


def test_a_model_continues_with_its_tokens(folder, other, tmp_path):
    trained = tmp_path / "step_00000005/tokenizer.json"
    trained.parent.mkdir()
    # Without one nothing is known; so too with a file that an older version copied unread.
    check_model_tokenizer(_config(folder), trained)
    trained.write_text("{}")
    check_model_tokenizer(_config(folder), trained)
    shutil.copy(folder / "tokenizer.json", trained)
    check_model_tokenizer(_config(folder), trained)
    _rewritten(folder / "tokenizer.json", trained)
    check_model_tokenizer(_config(folder), trained)
    # A corpus that was prepared again, with another tokenizer of equal size.
    shutil.copy(other, folder / "tokenizer.json")
    (line,) = refusal(check_model_tokenizer, _config(folder), trained).splitlines()
    assert f"whose ids must mean the tokens that {trained.parent} was trained on" in line
    assert f"prepare the text again with --tokenizer {trained}" in line


def test_a_folder_names_the_file_in_it(folder, tmp_path):
    assert tokenizer_of_run(_config(folder)) == folder / "tokenizer.json"
    assert tokenizer_of_run(_config(tmp_path, folder)) == folder / "tokenizer.json"
    assert tokenizer_of_run(_config(folder, tmp_path / "x.json")) == tmp_path / "x.json"
