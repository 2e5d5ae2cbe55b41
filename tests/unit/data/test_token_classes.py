"""The class of a token."""

import pytest

from moepp_megatron.data.token_classes import (
    CLASSES,
    ID_CLASSES,
    _id_classes,
    language_of,
    token_classes,
)

CODE = '''def read_all(path):
    """Reads it, don't you know: class."""
    if 0x1f > 2.5 and log10 is not None:  # for all
        return f"text {path} in"
'''


def classes_of(text, tokens, language="text"):
    """Classes of tokens that make up the text."""
    spans, begin = [], 0
    for token in tokens:
        assert text.startswith(token, begin), (token, text[begin:])
        spans.append((begin, begin + len(token)))
        begin += len(token)
    return [CLASSES[index] for index in token_classes(text, spans, language)]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["The", " cat"], ["word", "word"]),
        (["un", "believ", "able"], ["word, first part", "word, later part", "word, later part"]),
        ([" un", "like"], ["word, first part", "word, later part"]),
        (["don", "'t"], ["word, first part", "word, later part"]),
        (["in", " ", "1", "984", "."], ["word", "white space", "number", "number", "punctuation"]),
        (["...", "\n\n", "--\n"], ["punctuation", "white space", "punctuation"]),
        (["Gr\u00f6", "\u00dfe"], ["word, first part", "word, later part"]),
        (["\U0001f916", ""], ["punctuation", "part of a character"]),
        # Prose has no keywords.
        (["for", " me"], ["word", "word"]),
    ],
)
def test_prose(tokens, expected):
    assert classes_of("".join(tokens), tokens) == expected


def test_python_knows_keywords_identifiers_strings_and_comments():
    tokens = ["def", " read", "_", "all", "(", "path", "):\n", "   ", ' """', "Reads", " it", ","]
    tokens += [" don't", " you", " know", ":", " class", '."""', "\n   ", " if", " 0", "x1f"]
    tokens += [" >", " 2", ".5", " and", " log", "10", " is", " not", " None", ":", "  #", " for"]
    tokens += [" all", "\n       ", " return", " f", '"', "text", " {", "path", "}", " in", '"\n']
    expected = {
        "keyword": ["def", " if", " and", " is", " not", " None", " return"],
        "identifier, first part": [" read", " log"],
        "identifier, later part": ["_", "all", "10"],
        "punctuation": ["(", "):\n", ' """', ",", ":", '."""', " >", "  #", '"', " {", "}", '"\n'],
        "identifier": ["path", " f"],
        "white space": ["   ", "\n   ", "\n       "],
        "word": [
            "Reads",
            " it",
            " don't",
            " you",
            " know",
            " class",
            " for",
            " all",
            "text",
            " in",
        ],
        "number": [" 0", "x1f", " 2", ".5"],
    }
    found = zip(tokens, classes_of(CODE, tokens, "python"), strict=True)
    assert dict(found) == {token: kind for kind in expected for token in expected[kind]}


@pytest.mark.parametrize(
    "text", ["if x:\n  '''open", "x = (1,\n", "  bad\n indent\n\tx", "a\r\nb\r\n"]
)
def test_what_is_no_whole_python_is_still_classified(text):
    tokens = [*text]
    assert len(classes_of(text, tokens, "python")) == len(text)


def test_language_is_that_of_the_name_unless_told(tmp_path):
    assert language_of(tmp_path / "a.py", "auto") == "python"
    assert language_of(tmp_path / "a.txt", "auto") == "text"
    assert language_of(tmp_path / "a.txt", "python") == "python"
    assert language_of(tmp_path / "a.py", "text") == "text"


def test_ids_are_classified_by_their_own_characters():
    """As tokens of a text are, but that neither a keyword nor a name depends on where it stands."""
    expected = {
        " cat": "word",
        "able": "word",
        " for": "keyword",
        "_x1": "word",
        "('a": "word",
        "984": "number",
        " 0x": "number",
        ").\n": "punctuation",
        "\n    ": "white space",
        "\ufffd": "part of a character",
        "": "part of a character",
    }
    found = [ID_CLASSES[index] for index in _id_classes(list(expected))]
    assert dict(zip(expected, found, strict=True)) == expected
