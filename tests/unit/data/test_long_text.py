import random
import sys

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from moepp_megatron.data.long_text import PATTERNS, PIECE_CHARACTERS, can_cut, cut_text
from moepp_megatron.data.tokenizer import Tokenizer, train_tokenizer
from tests.commands import captured

# Parts that texts are drawn from: words, contractions and their halves, digits, punctuation, white
# space of every kind (also what Python and Unicode call so differently), marks, scripts without
# spaces, characters outside of the basic plane, controls.
PARTS = [
    *[
        "a",
        "Zebra",
        "don't",
        "we'll",
        "'",
        "'s",
        "'S",
        "l",
        "re",
        "_",
        "x_y",
        "def f(x):",
        "\u00df",
    ],
    *["0", "7", "12345", "\u00b2", "\u0664", "\u216b", "1a2b"],
    *["!", "...", ",", "/", "//", "\\", "#!", '"', "\u2014", "\u00b7", "\u20ac", "=>", "\u037e"],
    *[" ", "  ", "     ", "\t", "\n", "\n\n", "\r\n", "\r", "\x0b", "\x0c", "\x85", "\u00a0"],
    *["\u2028", "\u3000", "\u180e", "\u200b", "\x1c", "\x1f", "\ufeff", "\x00", "\x7f"],
    *["e\u0301", "\u0301", "\u0915\u094d\u0937", "\u0e17\u0e35\u0e48", "\u200d", "\u0345"],
    *["\u6f22\u5b57", "\u4eee\u540d", "\u304b\u306a", "\uff0c", "\u3002", "\uff01", "\ud55c\uae00"],
    *["\U0001f469\u200d\U0001f467", "\U00020000", "\U0001d7d8", "\U00011f04", "\U000e0001"],
]
DEEPSEEK = [r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"]


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def bytes_of():
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def known():
    """A pre-tokenizer with each of the patterns, alone and as published tokenizers have it."""
    steps = pre_tokenizers.Sequence
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    found = {
        "own": own,
        "digits": steps([pre_tokenizers.Digits(individual_digits=True), own]),
        "runs of digits": steps([pre_tokenizers.Digits(individual_digits=False), own]),
    }
    for index, pattern in enumerate(sorted(PATTERNS.values())):
        further = [split(p) for p in DEEPSEEK] if r"\p{P}" in pattern else []
        found[f"pattern {index}"] = steps([*further, split(pattern), bytes_of()])
    return found


def draw(generator, length):
    """A text, in part of few of the parts, so that long runs of one kind occur."""
    few = generator.sample(PARTS, generator.choice([1, 3, 10, 30, len(PARTS)]))
    return "".join(generator.choices(few, k=length))


def pre_tokens(pre_tokenizer, text):
    return [token for token, _ in pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", known())
def test_pieces_have_the_pre_tokens_of_the_whole(name):
    pre_tokenizer = known()[name]
    generator = random.Random(name)
    cut = 0
    for _ in range(1500):
        text = draw(generator, generator.randint(5, 60))
        pieces = list(cut_text(text, generator.randint(1, 8)))
        assert "".join(pieces) == text
        assert all(pieces)
        cut += len(pieces) > 1
        of_pieces = [token for piece in pieces for token in pre_tokens(pre_tokenizer, piece)]
        assert of_pieces == pre_tokens(pre_tokenizer, text), repr(text)
    assert cut > 800, "most texts must be cut, or the test tells nothing"


def test_own_tokenizer_gives_pieces_the_tokens_of_the_whole(texts):
    generator = random.Random(0)
    tokenizer = train_tokenizer([*texts, *(draw(generator, 100) for _ in range(50))], 600)
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    backend.encode_special_tokens = True
    for _ in range(200):
        text = draw(generator, 40) + generator.choice(["", "<|endoftext|>", "<|endof text|>"])
        pieces = cut_text(text, generator.randint(1, 20))
        ids = [token for piece in pieces for token in tokenizer.encode(piece)]
        assert ids == backend.encode(text).ids


def test_long_texts_are_encoded_in_pieces(tokenizer, monkeypatch):
    class Spy:
        lengths: list[int] = []

        def encode_batch_fast(self, texts, **arguments):
            self.lengths += map(len, texts)
            return backend.encode_batch_fast(texts, **arguments)

    text = "".join(f"line {i}: two words, (and) x{i}\n" for i in range(8000))
    backend = tokenizer._backend
    whole = backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.cuts_long_texts
    monkeypatch.setattr(tokenizer, "_backend", Spy())
    assert tokenizer.encode(text) == whole
    assert len(Spy.lengths) >= 4
    assert max(Spy.lengths) <= PIECE_CHARACTERS
    assert sum(Spy.lengths) == len(text)


def test_pieces_are_as_long_as_the_limit_where_there_is_no_place_to_cut():
    assert list(cut_text("abc def ghi", 5)) == ["abc", " def", " ghi"]
    assert list(cut_text("x" * 30 + " y", 8)) == ["x" * 30, " y"]
    assert list(cut_text("x" * 5000, 8)) == ["x" * 5000]
    assert list(cut_text("", 8)) == []
    # The last place before the limit, however far back it is.
    assert list(cut_text("ab " + "x" * 3000, 2000)) == ["ab", " " + "x" * 3000]


def made(pre_tokenizer=None, normalizer=None, added=()):
    backend = tokenizers.Tokenizer(models.BPE())
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens(list(added))
    return backend


OWN = known()["own"]


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        *((made(pre_tokenizer), True) for pre_tokenizer in known().values()),
        (made(OWN, normalizers.NFC()), True),
        (made(OWN, normalizers.Sequence([])), True),
        (made(OWN, added=["<tool>", AddedToken("  ", normalized=False)]), True),
        # What is said of nothing is not assumed.
        (made(), False),
        (made(pre_tokenizers.Metaspace()), False),
        (made(bytes_of()), False),
        (made(split(r"\p{N}")), False),
        (made(split(r"\w+ \w+")), False),
        (made(pre_tokenizers.Split(Regex(sorted(PATTERNS.values())[0]), "removed")), False),
        (made(pre_tokenizers.ByteLevel(add_prefix_space=True)), False),
        (made(pre_tokenizers.Sequence([OWN, pre_tokenizers.Metaspace()])), False),
        (made(OWN, normalizers.Replace("a b", "c")), False),
        # Tokens that take part of what is beyond a cut, or look there.
        (made(OWN, added=["two words"]), False),
        (made(OWN, added=["x1"]), False),
        (made(OWN, added=[AddedToken("<tool>", rstrip=True)]), False),
        (made(OWN, added=[AddedToken("tool", single_word=True)]), False),
    ],
)
def test_only_what_is_known_to_split_is_cut(backend, expected):
    assert can_cut(backend) == expected


def test_other_tokenizers_encode_whole():
    vocab = {"<eod>": 0, "a b": 1, "a": 2, "b": 3, " ": 4, "a ": 5}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("a", " "), ("a ", "b")]))
    tokenizer = Tokenizer(backend, "<eod>")
    assert not tokenizer.cuts_long_texts
    text = "a b" * PIECE_CHARACTERS
    assert tokenizer.encode(text) == [1] * PIECE_CHARACTERS


def test_memory_of_a_long_document_is_bounded():
    """Encoded whole, a byte of text takes some 160 bytes; a fixed amount is some 20 of this one."""
    script = """
import resource
from moepp_megatron.data.tokenizer import train_tokenizer
text = "".join(f"line {i}: two words, (and) x{i} more of them\\n" for i in range(60_000))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
tokenizer = train_tokenizer([text], 300)
tokens = sum(len(ids) for ids in tokenizer.encode_in_pieces(text))
assert tokens > 4e5
print((peak() - before) / len(text))
"""
    done = captured([sys.executable, "-c", script], timeout=120, check=True)
    assert float(done.stdout) < 50
