"""`moepp score --text`: windows of a text, and the perplexity that comes out."""

import math
import re

import numpy as np
import pytest

from moepp_megatron.data.tokenizer import train_tokenizer
from moepp_megatron.interop.score import ScoreRequest, _TextWindows
from tests.commands import cold, moepp, succeeded
from tests.interop.checkpoints import GOLDEN, hf_to_mcore, score
from tests.interop.test_cli import TP2
from tests.refusals import config_error

TEXT = "one two three four\nf\u00fcnf sechs \u20ac\r\n" * 9


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of 256 tokens and sequences of 64, with a tokenizer that has fewer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("golden") / "mcore"
    hf_to_mcore(GOLDEN / "two_layer_gate", folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:255]
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=vocabulary | {"<|endoftext|>": 255}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("length", "shape"), [(8, (3, 8)), (20, (1, 20)), (99, (1, 20)), (2, (19, 2))]
)
def test_every_token_is_predicted_once(tmp_path, length, shape):
    tokenizer = train_tokenizer(["abc"], 257)
    file = tmp_path / "text.txt"
    file.write_text("nineteen characters")
    text = _TextWindows.read(file, tokenizer, length)
    ids = tokenizer.encode("nineteen characters")
    assert text.input_ids.shape == shape
    assert text.num_tokens == len(ids) == 19
    assert text.of_tokens(text.input_ids[:, 1:]).tolist() == ids
    # A window begins with the last token of the one before, the first with a document's end.
    assert text.input_ids[0, 0] == tokenizer.eod
    assert (text.input_ids[1:, 0] == text.input_ids[:-1, -1]).all()


def test_perplexity_on_the_command_line(checkpoint, tmp_path, on_one_rank):
    file = tmp_path / "text.txt"
    file.write_text(TEXT, newline="")
    done = succeeded(cold("score", checkpoint, "--text", file, "--out", tmp_path / "out.npz"))
    size = len(TEXT.encode())
    rows = math.ceil(size / 63)
    assert f"text         {size:,} tokens in {rows} windows of at most 64" in done.stdout
    with np.load(tmp_path / "out.npz") as scores:
        logprobs, ids = scores["token_logprobs"], scores["token_ids"]
    assert logprobs.shape == ids.shape == (size,)
    loss = float(re.search(r"loss +(\S+) nats per token, (\S+) bits per byte", done.stdout)[1])  # type: ignore[index]
    assert loss == pytest.approx(-logprobs.mean(), abs=1e-4)
    perplexity = re.search(r"perplexity +(\S+)", done.stdout)[1]  # type: ignore[index]
    assert float(perplexity.replace(",", "")) == pytest.approx(math.exp(loss), rel=1e-3)

    # The same by --tokens, window by window: a window knows nothing of the one before.
    windows = np.lib.stride_tricks.sliding_window_view(np.array([255, *ids]), 64)[::63]
    np.savez(tmp_path / "tokens.npz", input_ids=windows)
    expected = on_one_rank(score, checkpoint, tmp_path / "tokens.npz", [])
    count = windows.shape[0] * 63
    np.testing.assert_allclose(
        logprobs[:count], expected["token_logprobs"].reshape(-1), rtol=0, atol=1e-5
    )


@pytest.mark.parallel
def test_ranks_agree_on_the_perplexity(checkpoint, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT[:70], newline="")
    one = moepp("score", checkpoint, "--text", file)
    two = moepp("score", checkpoint, TP2, "--text", file, "--nproc", "2")
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    numbers = [re.search(r"loss +(\S+) ", done.stdout) for done in (one, two)]
    first, second = (float(number[1]) for number in numbers if number is not None)
    # Printed with four digits; sums over ranks are in another order.
    assert first == pytest.approx(second, abs=1.1e-4)


@pytest.mark.parametrize(
    ("tokens", "text", "out", "logits", "named"),
    [
        (None, None, "o.npz", False, r"--tokens and --text \(neither\) must be given"),
        ("t.npz", "text.txt", "o.npz", False, r"--tokens and --text \(both\) must be given"),
        ("t.npz", None, None, False, r"--out \(absent\) must name"),
        (None, "text.txt", None, True, "--logits must not be given with --text"),
        (None, "gone.txt", None, False, r"--text \(.*gone\.txt\) cannot be read"),
        (None, "empty.txt", None, False, r"--text \(.*empty\.txt\) must hold some text"),
        (None, "bytes.txt", None, False, r"--text \(.*bytes\.txt\) must be text in UTF-8"),
    ],
)
def test_what_is_refused(checkpoint, tmp_path, tokens, text, out, logits, named):
    (tmp_path / "text.txt").write_text("abc")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    np.savez(tmp_path / "t.npz", input_ids=np.zeros((1, 2), int))
    paths = [None if name is None else tmp_path / name for name in (tokens, out, text)]
    with config_error(named):
        ScoreRequest.read(checkpoint, paths[0], paths[1], [], 1, logits, paths[2])


def test_a_checkpoint_without_a_tokenizer_is_reported(tmp_path):
    hf_to_mcore(GOLDEN / "two_layer_gate", tmp_path / "mcore")
    (tmp_path / "text.txt").write_text("abc")
    with config_error(r"must hold tokenizer\.json to turn text into tokens"):
        ScoreRequest.read(tmp_path / "mcore", None, None, [], 1, False, tmp_path / "text.txt")
