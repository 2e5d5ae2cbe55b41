"""The start of training is decided before any rank starts, on folders without tensors."""

import shutil
from pathlib import Path

import pytest

from moepp_megatron.data.tokenizer import train_tokenizer
from moepp_megatron.training.checkpoint.find import check_start
from moepp_megatron.training.checkpoint.write import _tokenizer_files
from tests.refusals import config_error
from tests.unit.training.conftest import config_of

AUTO = config_of(checkpoint={"load": "auto"})
WIDER = config_of(model={"hidden_size": 64}, checkpoint={"load": "auto"})


def _cut(path):
    path.write_bytes(path.read_bytes()[:100])


def _zero(path):
    """Leave a file as a power cut does: its length was written, its content was not."""
    path.write_bytes(bytes(path.stat().st_size))


HARM = {"cut": _cut, "zeros": _zero, "gone": Path.unlink}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
def test_a_damaged_configuration_falls_back(write, tmp_path, harm):
    write(tmp_path, 5)
    newest = write(tmp_path, 10)
    harm(newest / "config.yaml")
    check_start(AUTO, tmp_path)
    # The one before is judged, not passed over.
    with config_error(r"hidden_size .*step_00000005 \(32\)"):
        check_start(WIDER, tmp_path)
    run = config_of(checkpoint={"load": str(tmp_path)})
    check_start(run, tmp_path / "own")


def test_all_damaged_is_a_list_and_no_start_from_scratch(write, tmp_path):
    _cut(write(tmp_path, 5) / "config.yaml")
    (write(tmp_path, 10) / "__0_0.distcp").unlink()
    (tmp_path / "step_00000015").mkdir()
    with config_error(
        r"^checkpoint\.load \(auto\) must find a valid checkpoint of this run, and none of 3"
        r".*step_00000015: metadata\.json is missing"
        r".*step_00000010: __0_0\.distcp is missing"
        r".*step_00000005: config\.yaml has 100 bytes instead of"
        r".*restore one of them, or move them away.*$"
    ):
        check_start(AUTO, tmp_path)


def test_no_checkpoint_at_all_is_a_start_from_scratch(tmp_path):
    (tmp_path / ".step_00000005.incomplete-host-1-ab").mkdir()
    check_start(AUTO, tmp_path)
    check_start(AUTO, tmp_path / "none")


def test_a_sound_checkpoint_of_another_shape_is_refused_not_skipped(write, tmp_path):
    write(tmp_path, 5, model={"hidden_size": 64})
    write(tmp_path, 10)
    with config_error("hidden_size"):
        check_start(WIDER, tmp_path)


def test_tokens_are_compared_too(write, tmp_path):
    checkpoint = write(tmp_path / "checkpoints", 5)
    data = tmp_path / "data"
    data.mkdir()
    train_tokenizer(["one text " * 9], 262).save(data / "tokenizer.json")
    config = config_of(checkpoint={"load": "auto"}, data={"path": str(data)})
    shutil.copy(data / "tokenizer.json", checkpoint)
    check_start(config, checkpoint.parent)
    train_tokenizer(["another book " * 9], 262).save(data / "tokenizer.json")
    with config_error("whose ids must mean the tokens that .*step_00000005"):
        check_start(config, checkpoint.parent)


def test_only_a_tokenizer_is_taken_into_checkpoints(tmp_path, caplog):
    file = tmp_path / "tokenizer.json"
    assert _tokenizer_files(file) == {}
    assert caplog.messages == []
    file.write_text('{"no": "tokenizer"}')
    assert _tokenizer_files(file) == {}
    (message,) = caplog.messages
    assert message.startswith(f"checkpoints get no tokenizer.json: tokenizer ({file}) must be a")
    train_tokenizer(["one text " * 9], 262).save(file)
    assert _tokenizer_files(file) == {"tokenizer.json": file.read_bytes()}
