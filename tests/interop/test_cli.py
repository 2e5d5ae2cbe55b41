"""`moepp convert` and `moepp score` as commands: end to end, and what they refuse."""

import shutil

import numpy as np
import pytest

from moepp_megatron.interop.score import ScoreRequest
from tests.commands import cold, moepp, succeeded
from tests.full_disk import fill
from tests.interop.checkpoints import GOLDEN, convert_and_score, hf_to_mcore
from tests.refusals import config_error

CASE = GOLDEN / "two_layer_gate"
TP2 = "parallel.tensor_model_parallel_size=2"
CP2 = "parallel.context_parallel_size=2"


@pytest.mark.parallel
def test_golden_case_end_to_end(tmp_path):
    done = succeeded(moepp("convert", "hf-to-mcore", CASE, tmp_path / "mcore"))
    arguments = ["--tokens", CASE / "expected.npz", "--out", tmp_path / "out.npz", "--logits"]
    done = moepp("score", tmp_path / "mcore", TP2, *arguments, "--nproc", "2")
    assert (done.returncode, done.stderr) == (0, "")
    expected = np.load(CASE / "expected.npz")
    with np.load(tmp_path / "out.npz") as scores:
        assert set(scores.files) == {"token_logprobs", "logits"}
        for name in scores.files:
            np.testing.assert_allclose(scores[name], expected[name], rtol=0, atol=1e-4)

    succeeded(moepp("convert", "mcore-to-hf", tmp_path / "mcore", tmp_path / "hf"))
    assert (tmp_path / "hf/modeling_moepp.py").is_file()


def test_refusals_are_one_line_and_exit_code_2(tmp_path):
    done = cold("convert", "hf-to-mcore", tmp_path, tmp_path / "mcore")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {tmp_path / 'config.json'} cannot be read (No such file or directory); "
        "name the folder of a Hugging Face model"
    ]


def test_a_full_disk_is_one_line(small_disk, tmp_path):
    hf_to_mcore(CASE, tmp_path / "mcore")
    fill(small_disk, leave=100_000)
    for direction, source in (("hf-to-mcore", CASE), ("mcore-to-hf", tmp_path / "mcore")):
        done = moepp("convert", direction, source, small_disk / "out")
        assert done.returncode == 3
        (line,) = done.stderr.splitlines()
        assert line.startswith(
            f"error: {small_disk / 'out'} cannot be written: No space left on device after 0."
        )
        assert [path.name for path in small_disk.iterdir()] == ["ballast"]


def test_a_tokenizer_that_is_none_is_not_taken_over(tmp_path):
    source = shutil.copytree(CASE, tmp_path / "hf")
    (source / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    message = r"hf/tokenizer.json\) must be a Hugging Face tokenizer.json .*; fetch it again"
    with config_error(message):
        hf_to_mcore(source, tmp_path / "mcore")
    assert not (tmp_path / "mcore").exists()


def odd_lengths(folder, overrides):
    """Scores of sequences of 29 tokens: 3 of them, so that data-parallel ranks differ too."""
    ids = np.load(CASE / "expected.npz")["input_ids"]
    tokens = folder / f"{len(overrides)}.npz"
    np.savez(tokens, input_ids=np.concatenate([ids, ids[:1]])[:, :29])
    return convert_and_score(CASE, folder / f"mcore{len(overrides)}", tokens, overrides)


@pytest.mark.parametrize("overrides", [[TP2], [TP2, CP2], []])
def test_fillers_change_nothing(ranks, tmp_path, overrides):
    expected = np.load(CASE / "expected.npz")
    scores = ranks(4).run(odd_lengths, tmp_path, overrides)[0]
    assert scores["token_logprobs"].shape == (3, 28)
    assert scores["logits"].shape == (3, 29, 256)
    wanted = expected["token_logprobs"][[0, 1, 0], :28]
    np.testing.assert_allclose(scores["token_logprobs"], wanted, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden") / "mcore"
    hf_to_mcore(CASE, folder)
    return folder


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"input_ids": np.full((2, 4), 256)}, r"input_ids \(256\) must be between 0 and 255"),
        ({"input_ids": np.full((2, 4), -1)}, r"input_ids \(-1\) must be between 0 and 255"),
        ({"tokens": np.zeros((2, 4), int)}, "npz file with the array input_ids"),
        ({"input_ids": np.zeros(4, int)}, r"input_ids \[4\] must be \[sequences, tokens\]"),
        ({"input_ids": np.zeros((0, 4), int)}, r"input_ids \[0, 4\] must be"),
        ({"input_ids": np.zeros((2, 1), int)}, r"at least 1 sequence of 2 tokens"),
        ({"input_ids": np.zeros((2, 4))}, r"input_ids \(float64\) must be whole numbers"),
        ({"input_ids": np.array([[object()]])}, "input_ids: Object arrays"),
    ],
)
def test_wrong_tokens_are_refused(checkpoint, tmp_path, arrays, named):
    tokens = tmp_path / "tokens.npz"
    np.savez(tokens, **arrays)
    with config_error(named):
        ScoreRequest.read(checkpoint, tokens, tmp_path / "out.npz", [], 1, False)


@pytest.mark.parametrize("content", [b"", b"no archive", np.lib.format.magic(1, 0)])
def test_files_that_are_no_npz_are_refused(checkpoint, tmp_path, content):
    tokens = tmp_path / "tokens.npz"
    tokens.write_bytes(content)
    with config_error(r"tokens\.npz\)"):
        ScoreRequest.read(checkpoint, tokens, tmp_path / "out.npz", [], 1, False)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["moe.tau=0.5"], r"moe\.tau must be in section parallel or precision"),
        ([TP2], r"world size \(1\) must be divisible by"),
        (["parallel.tensor_size=2"], "tensor_size"),
        (["parallel.pipeline_model_parallel_size=3"], "pipeline_model_parallel_size"),
    ],
)
def test_wrong_layouts_are_refused(checkpoint, tmp_path, overrides, named):
    tokens = CASE / "expected.npz"
    with config_error(named):
        ScoreRequest.read(checkpoint, tokens, tmp_path / "out.npz", overrides, 1, False)


def test_notices_say_what_was_done(checkpoint, tmp_path):
    tokens = tmp_path / "tokens.npz"
    np.savez(tokens, input_ids=np.zeros((1, 65), int))
    request = ScoreRequest.read(checkpoint, tokens, tmp_path / "out.npz", [TP2], 2, False)
    padded, long = request.notices
    assert "padded to 66" in padded
    assert "longer than those that the model was made for (64)" in long
