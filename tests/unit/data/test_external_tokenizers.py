"""Tokenizers in other forms give the ids of their own library."""

import base64
import json
import sys
from pathlib import Path

import pytest

from moepp_megatron.config.errors import UnfitError
from moepp_megatron.data import external_tokenizers
from moepp_megatron.data.external_tokenizers import ExternalTokenizer
from moepp_megatron.data.prepare import PrepareSettings, prepare
from moepp_megatron.data.tokenizer import Tokenizer
from tests.refusals import config_error
from tests.unit.data.conftest import make_texts

HARD = [
    "</s> <s> <0x41>",
    "  two  spaces ",
    "line\n\nend \t",
    "12345",
    "\U0001f600 \u2116",
    "\u2581x",
]


def sentencepiece_model(folder, kind, **options):
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece")
    pytest.importorskip("google.protobuf", reason="needs protobuf")
    pytest.importorskip("transformers", reason="needs transformers")
    source = folder / "texts.txt"
    texts = [*make_texts(40), *["< / s k > | f 0 x"] * 9]
    source.write_text("\n".join(line for text in texts for line in text.split("\n")))
    sentencepiece.SentencePieceTrainer.train(
        input=str(source),
        model_prefix=str(folder / kind),
        model_type=kind,
        vocab_size=330,
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
        character_coverage=1.0,
        **options,
    )
    return folder / f"{kind}.model"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "options", [{}, {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}]
)
def test_sentencepiece_gives_its_ids(tmp_path, kind, options):
    import sentencepiece

    path = sentencepiece_model(tmp_path, kind, **options)
    given = ExternalTokenizer.open(path, None)
    own = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = [*make_texts(20), *HARD]
    given.check(texts)
    assert [given.tokenizer.encode(text) for text in texts] == own.encode(texts)
    assert (given.tokenizer.eod, given.tokenizer.eod_token) == (own.eos_id(), "</s>")
    assert given.tokenizer.vocab_size == own.vocab_size()
    (tmp_path / "tokenizer.json").write_bytes(given.content)
    again = Tokenizer.load(tmp_path / "tokenizer.json", "</s>")
    assert again.encode(texts[0]) == own.encode(texts[0])
    # As text it is none, but what a chat template spells ends the answer.
    assert again.encode("yes</s>") == own.encode("yes</s>")
    assert again.encode_with_spans("yes</s>", has_special_tokens=True)[0] == [
        *own.encode("yes"),
        own.eos_id(),
    ]


def test_a_conversion_with_other_ids_is_refused(tmp_path):
    given = ExternalTokenizer.open(sentencepiece_model(tmp_path, "bpe"), None)
    wrong = ExternalTokenizer(
        given.tokenizer, given.content, given.identity, lambda text: [1, *given.original(text)]
    )
    with config_error("it gives 'a' other ids than its own library"):
        wrong.check([])


@pytest.fixture
def ranks(tmp_path):
    """A file of ranks: all bytes, and some pairs."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"wo", b"rd", b"word", b" word", b" i", b"in", b" in", b"es", b"lin", b"lines"]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    path = tmp_path / "own.tiktoken"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "qwen2", "o200k"])
def test_ranks_give_tiktoken_s_ids(ranks, monkeypatch, pattern):
    tiktoken = pytest.importorskip("tiktoken", reason="needs tiktoken")
    pytest.importorskip("transformers", reason="needs transformers")
    special = ("<|unused|>", "<|endoftext|>")
    monkeypatch.setattr(external_tokenizers, "_ENCODINGS", {266: (pattern, special)})
    given = ExternalTokenizer.open(ranks, None)
    texts = [*make_texts(20), *HARD]
    given.check(texts)
    lines = [line.split() for line in ranks.read_text().splitlines()]
    own = tiktoken.Encoding(
        "own",
        pat_str=external_tokenizers.PATTERNS[pattern],
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in lines},
        special_tokens={"<|endoftext|>": 267},
    )
    assert [given.tokenizer.encode(text) for text in texts] == own.encode_ordinary_batch(texts)
    assert given.tokenizer.eod == own.eot_token == 267


def test_known_encodings_are_tiktoken_s():
    """Numbers of ranks and end-of-document ids as its source has them; it fetches the ranks."""
    public = pytest.importorskip("tiktoken_ext.openai_public", reason="needs tiktoken")
    source = Path(public.__file__).read_text()
    for ranks, end in ((50256, 50256), (100256, 100257), (199998, 199999)):
        special = external_tokenizers._ENCODINGS[ranks][1]
        assert ranks + special.index("<|endoftext|>") == end
        assert f"ENDOFTEXT: {end}" in source


def test_ranks_of_an_unknown_number_are_refused(ranks):
    with config_error(r"has 266 ranks, and must have one of 50256, 100256"):
        ExternalTokenizer.open(ranks, None)


def test_a_folder_is_its_tokenizer(prepared, tmp_path, corpus_file):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((prepared / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "a"}))
    settings = PrepareSettings(tokenizer=folder, workers=1)
    manifest = prepare(corpus_file, tmp_path / "out", settings).manifest
    assert manifest.eod_token == "a"
    by_file = PrepareSettings(tokenizer=folder / "tokenizer.json", workers=1)
    assert prepare(corpus_file, tmp_path / "out", by_file).up_to_date


def test_a_folder_without_tokenizer_json(tmp_path):
    pytest.importorskip("transformers", reason="needs transformers")
    from transformers import GPT2Tokenizer

    from moepp_megatron.data.tokenizer import train_tokenizer

    backend = json.loads(train_tokenizer(make_texts(20), 300).content())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(backend["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in backend["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    given = ExternalTokenizer.open(tmp_path, None)
    own = GPT2Tokenizer.from_pretrained(tmp_path)
    text = make_texts(3)[2]
    assert given.tokenizer.encode(text) == own.encode(text, add_special_tokens=False)
    assert given.tokenizer.eod_token == "<|endoftext|>"
    (tmp_path / "empty").mkdir()
    with config_error(r"must hold tokenizer\.json or tokenizer_config\.json"):
        ExternalTokenizer.open(tmp_path / "empty", None)


@pytest.mark.parametrize("missing", ["transformers", "sentencepiece"])
def test_missing_packages_are_told(tmp_path, monkeypatch, missing):
    (tmp_path / "a.model").write_bytes(b"\x0a\x0e\xff")
    for name in [each for each in sys.modules if each.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UnfitError, match=r"pip install sentencepiece protobuf"):
        ExternalTokenizer.open(tmp_path / "a.model", None)


def test_a_tokenizer_of_the_hub_is_to_be_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fetch = "hf download Qwen/Qwen3-8B --include 'tokenizer[*]' --local-dir Qwen3-8B"
    with config_error(fetch):
        ExternalTokenizer.open(Path("Qwen/Qwen3-8B"), None)
    Path("data").mkdir()
    with config_error("name a file or its folder$"):
        ExternalTokenizer.open(Path("data/tokenizer.json"), None)
