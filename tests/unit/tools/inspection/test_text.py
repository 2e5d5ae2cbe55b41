"""A text as tokens with their places."""

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from moepp_megatron.data.tokenizer import EOD_TOKEN, Tokenizer
from moepp_megatron.interop.score import text_of
from moepp_megatron.tools.inspection.text import TokenizedText
from tests.refusals import config_error

AWKWARD = "plain words,  and more\n\n\tGr\u00f6\u00dfe \u6f22 \U0001f916!\r\n   end "


def whole(text):
    """Spans are in order, do not overlap and cover the text."""
    flat = text.spans.ravel().tolist()
    assert flat == sorted(flat)
    assert "".join(text.pieces) == text.text


def test_pieces_make_up_the_text(tokenizer):
    text = TokenizedText.of(tokenizer, AWKWARD, "x", 1000)
    assert text.text == AWKWARD
    whole(text)
    # The robot is four bytes that were never merged: three tokens have no character of their own.
    assert text.pieces.count("") >= 3
    assert text.pieces[text.pieces.index("\U0001f916") + 1] == ""


def test_trimmed_offsets_lose_no_white_space():
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {EOD_TOKEN: 0, **{c: i for i, c in enumerate(sorted(alphabet), start=1)}}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOD_TOKEN])
    text = TokenizedText.of(Tokenizer(backend, EOD_TOKEN), "a  b\n\n c", "x", 100)
    whole(text)
    assert len(text) == 8


def test_limit_cuts_the_text(tokenizer):
    text = TokenizedText.of(tokenizer, AWKWARD, "x", 5)
    assert len(text) == 5
    assert text.is_cut
    assert AWKWARD.startswith(text.text)
    whole(text)


def test_windows_follow_each_other(tokenizer):
    text = TokenizedText.of(tokenizer, AWKWARD, "x", 11)
    cut = text.windows(4, filler=7)
    assert cut.shape == (3, 4)
    assert cut.ravel()[:11].tolist() == text.ids.tolist()
    assert cut[2, 3] == 7
    assert np.array_equal(text.windows(100, filler=7), [text.ids])


def test_one_token_is_too_little(tokenizer):
    with config_error(r"--text \(x, 1 tokens\) must have at least 2 tokens"):
        TokenizedText.of(tokenizer, "a", "x", 10)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, r"cannot be read \(No such file"),
        (b"", "must hold some text, and is empty"),
        (
            b"ab\xff",
            r"must be text in UTF-8, and is another kind .*\(invalid start byte\)",
        ),
    ],
)
def test_unreadable_text_is_refused(tmp_path, content, named):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with config_error(named):
        text_of(path, 640)


def test_no_more_is_read_than_the_limit_can_need(tmp_path):
    (tmp_path / "text.txt").write_text("x" * 10_000)
    text, is_cut = text_of(tmp_path / "text.txt", 640)
    assert len(text) == 640
    assert is_cut
    with config_error("Is a directory"):
        text_of(tmp_path, 640)
