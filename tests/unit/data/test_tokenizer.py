import json

import pytest
import tokenizers

from moepp_megatron.data.tokenizer import EOD_TOKEN, Tokenizer, tokenizer_config, train_tokenizer
from tests.refusals import config_error, config_line

AWKWARD = [
    "",
    " ",
    "\n\n\t  x",
    "plain words, and more  spaces",
    "Gr\u00f6\u00dfe \u2116 \u6f22\u5b57 \U0001f916"
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 e\u0301 \u200b\ufeff",
    "\x00\x01\x7f\r\n\r",
    f"a text that spells {EOD_TOKEN} itself",
    "".join(map(chr, range(0x20, 0x250))),
]


@pytest.mark.parametrize("text", AWKWARD)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_training_gives_the_size_asked_for_and_is_repeatable(texts, tmp_path):
    for name in ("a", "b"):
        tokenizer = train_tokenizer(texts, 290)
        tokenizer.save(tmp_path / name)
    assert tokenizer.vocab_size == 290
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert len(tokenizer.encode(texts[0])) < len(texts[0].encode())


def test_loaded_tokenizer_neither_truncates_nor_adds_special_tokens(tmp_path):
    from tokenizers import models, processors

    vocab = {"<s>": 0, "</s>": 1, "a": 5}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $0 </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    backend.enable_truncation(2)
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    tokenizer = Tokenizer.load(path)
    assert tokenizer.encode("aaaa") == [5, 5, 5, 5]
    assert (tokenizer.eod, tokenizer.eod_token) == (1, "</s>")
    assert tokenizer.vocab_size == 6  # ids 0 to 5, though only three tokens
    assert Tokenizer.load(path, "<s>").eod == 0
    with config_error(r"--eod-token \(<end>\) must be in"):
        Tokenizer.load(path, "<end>")


def test_unusable_tokenizer_files_are_named(tmp_path):

    with config_error(r"none\.json\) cannot be read"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with config_error(r"bad\.json\) must be a Hugging Face tokenizer\.json"):
        Tokenizer.load(tmp_path / "bad.json")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    backend.save(str(tmp_path / "no-eod.json"))
    with config_error("no known end-of-document token .* with --eod-token"):
        Tokenizer.load(tmp_path / "no-eod.json")


@pytest.mark.parametrize("entry", ["<stop>", {"content": "<stop>", "lstrip": False}])
def test_end_of_document_is_the_one_named_beside_the_file(tmp_path, texts, entry):
    train_tokenizer(texts, 290).save(tmp_path / "tokenizer.json")
    path = tmp_path / "tokenizer.json"
    known = Tokenizer.load(path)
    # Another name, at the end of the vocabulary; the known one is still there.
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 290, "content": "<stop>"})
    path.write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": entry}))
    assert known.eod_token == EOD_TOKEN
    assert (Tokenizer.load(path).eod_token, Tokenizer.load(path).eod) == ("<stop>", 290)
    assert Tokenizer.load(path, EOD_TOKEN).eod == known.eod
    (tmp_path / "tokenizer_config.json").write_bytes(tokenizer_config("<gone>"))
    with config_error(r"must have the end-of-document token \(<gone>\)"):
        Tokenizer.load(path)
    # Damaged, or without the entry: as if it were not there.
    for nothing in ("[]", "{", '{"eos_token": null}'):
        (tmp_path / "tokenizer_config.json").write_text(nothing)
        assert Tokenizer.load(path).eod_token == EOD_TOKEN


DAMAGED = {
    "word level": {"model": {"type": "WordLevel", "vocab": {"<|endoftext|>": 0}, "unk_token": "u"}},
    # The library panics, which Python sees as no `Exception`.
    "panic": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_the_library_fails_with_is_one_line(name, tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"<|endoftext|>": 0}, []))
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(backend.to_str()), **DAMAGED[name]}))
    with config_line("; fetch it again$"):
        Tokenizer.load(file).encode("text")
    with config_error("; fetch it again$"):
        Tokenizer.load(file).encode_with_spans("text")
