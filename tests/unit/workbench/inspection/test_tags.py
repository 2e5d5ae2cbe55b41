"""Parts of speech from a file or a tagger."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moepp_megatron.config import ConfigError, UnfitError
from moepp_megatron.workbench.inspection.tags import read_tags, run_tagger, token_tags

TEXT = "The cat sat on the cat."


@pytest.mark.parametrize(
    "content",
    [
        "# a comment\ncat\tNOUN\n\nsat\tVERB\ncat\tNOUN\n",
        '[["cat", "NOUN"], ["sat", "VERB"], ["cat", "NOUN"]]',
    ],
)
def test_words_are_found_in_order(tmp_path: Path, content: str) -> None:
    (tmp_path / "tags").write_text(content)
    spans = read_tags(tmp_path / "tags", TEXT, is_cut=False)
    assert spans == [(4, 7, "NOUN"), (8, 11, "VERB"), (19, 22, "NOUN")]


def test_tokens_take_the_tag_of_their_word() -> None:
    tokens = [(0, 3), (3, 5), (5, 7), (7, 11), (11, 14), (14, 14), (14, 18), (18, 22), (22, 23)]
    tagged = [(4, 7, "NOUN"), (8, 11, "VERB"), (19, 22, "NOUN")]
    assert token_tags(tokens, tagged) == [
        None, "NOUN", "NOUN", "VERB", None, None, None, "NOUN", None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("dog\tNOUN\n", "line 1: 'dog' must be in the text"),
        ("sat\tVERB\nThe\tDET\n", "line 2: 'The' must be in the text behind"),
        ("cat NOUN\n", r"line 1 \('cat NOUN'\) must be a word, a tab and its tag"),
        ("# nothing\n", "must tag at least one word"),
        ("[]", "must tag at least one word"),
        ('[["cat"]]', r'entry 1 \(\["cat"\]\) must be \["word", "tag"\]'),
        ("[", "must be JSON or lines"),
        ("[" * 100_000, "must be JSON or lines"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "tags").write_text(content)
    with pytest.raises(ConfigError, match=named) as caught:
        read_tags(tmp_path / "tags", TEXT, is_cut=False)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_tags(tmp_path / "none", TEXT, is_cut=False)


def test_words_behind_the_end_of_a_cut_text_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "tags").write_text("cat\tNOUN\ndog\tNOUN\n")
    assert read_tags(tmp_path / "tags", TEXT, is_cut=True) == [(4, 7, "NOUN")]


@pytest.mark.parametrize("tagger", ["nltk", "spacy"])
def test_a_tagger_that_is_not_installed_says_so(monkeypatch, tagger: str) -> None:
    monkeypatch.setitem(sys.modules, tagger, None)
    with pytest.raises(UnfitError, match=rf"--tagger \({tagger}\) needs the package {tagger}"):
        run_tagger(tagger, TEXT)  # type: ignore[arg-type]


def test_a_tagger_without_its_model_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise OSError(f"[E050] Can't find model '{name}'")

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    with pytest.raises(UnfitError, match="needs its model en_core_web_sm"):
        run_tagger("spacy", TEXT)
