"""The files beside the weights of an exported model, and their contents."""

import json
import re
from unittest import mock

import numpy as np
import pytest

from moepp_megatron.data.chat_template import ChatTemplate
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.training.checkpoint.write import _tokenizer_files
from tests.interop.checkpoints import GOLDEN, hf_to_mcore, load_tensors, mcore_to_hf, write_released
from tests.interop.models import settings
from tests.interop.test_export import TOKENS, save_and_compute, write_tokenizer
from tests.interop.transformers_models import load_model
from tests.refusals import config_error
from tests.unit.data.test_conversations import chat, prepared, tokenizer_folder, write  # noqa: F401

RAW = settings(
    run={"dir": "unused", "name": "a run"},
    moe={"selection_bias": True, "tau": 0.5, "balance_coeff": 0.02},
)
# Of a run's last step; what else a record holds does not matter here.
RECORD = {
    "lr": 0,
    "grad_norm": 0,
    "step_time_s": 0,
    "tokens_per_s": 0,
    "balance_loss": 0,
    "ffn_per_token": 0,
    "max_ffn_load": 0,
    "dropped_fraction": 0,
    "a2a_bytes": 0,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, ranks):
    """A run of 3 steps, with records of 4."""
    folder = tmp_path_factory.mktemp("run")
    ranks(1).run(save_and_compute, RAW, folder / "checkpoints")
    records = [
        RECORD
        | {"step": step, "tokens": 64 * step, "loss": 4.5 - step, "ffn_fraction": step / 10}
        | {"expert_share": [0.125] * 8}
        for step in (1, 2, 3, 4)
    ]
    records[2]["valid_loss"] = 1.75
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def export(source, target, **options):
    mcore_to_hf(source, target, **options)
    fields = json.loads((target / "config.json").read_text())
    return fields


def test_special_tokens_and_settings(run, tmp_path):
    fields = export(run, tmp_path / "hf")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert fields[key] == 5, "the tokenizer's only special token"
    assert fields["router_aux_loss_coef"] == 0.02
    assert fields["dtype"] == "float32"
    assert fields["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    deprecated = {"torch_dtype", "rope_theta", "rope_scaling"}
    assert not deprecated & fields.keys(), "transformers 5 calls these otherwise"
    generation = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert generation == {"bos_token_id": 5, "eos_token_id": 5, "pad_token_id": 5}
    tokenizer = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == 16
    for key in ("bos_token", "eos_token", "pad_token"):
        assert tokenizer[key] == "<|endoftext|>"
    card = (tmp_path / "hf/README.md").read_text()
    for line in (
        "| experts of a MoE layer | 4 FFN, 2 constant, 1 copy, 1 zero; 2 per token |",
        "| FFN share measured at step 3 | 0.300 |",
        "| validation loss at step 3 | 1.7500 nats per token |",
        "Trained by moepp_megatron with the settings in `training_config.yaml` (`moepp train",
    ):
        assert f"\n{line}" in card
    assert "apply_chat_template" not in card


def test_a_model_without_a_tokenizer_has_no_special_tokens(tmp_path):
    hf_to_mcore(GOLDEN / "two_layer_gate", tmp_path / "mcore")
    (tmp_path / "mcore/hf_config.json").unlink()
    fields = export(tmp_path / "mcore", tmp_path / "hf")
    assert [fields[f"{key}_token_id"] for key in ("bos", "eos", "pad")] == [None] * 3


def test_a_model_of_hugging_face_keeps_its_tokens(tmp_path):
    hf_to_mcore(GOLDEN / "two_layer_gate", tmp_path / "mcore")
    write_tokenizer(tmp_path / "mcore/tokenizer.json")
    (tmp_path / "mcore/tokenizer_config.json").write_text('{"eos_token": "b", "own": 1}')
    before = json.loads((GOLDEN / "two_layer_gate/config.json").read_text())
    fields = export(tmp_path / "mcore", tmp_path / "hf")
    for key in ("bos_token_id", "eos_token_id"):
        assert fields[key] == before[key]
    tokenizer = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert (tokenizer["eos_token"], tokenizer["own"]) == ("b", 1)
    assert "pad_token" not in tokenizer


def loaded(folder, ids):
    """Load the folder in transformers, with its end and padding tokens for a batch of texts."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig

    model = load_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    batch = tokenizer(["abcd", "ab"], padding=True, return_tensors="pt")
    biases = {buffer.dtype for name, buffer in model.named_buffers() if "correction" in name}
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).logits.float().numpy()
    return {
        "dtype": str(model.dtype),
        "biases": {str(dtype) for dtype in biases},
        "pad": GenerationConfig.from_pretrained(folder).pad_token_id,
        "mask": batch["attention_mask"].tolist(),
        "length": tokenizer.model_max_length,
        "learns padding": model.model.embed_tokens.padding_idx is None,
        "logits": logits,
    }


def test_bf16_export_loads_and_pads(run, plain, tmp_path):
    assert export(run, tmp_path / "hf", dtype="bf16")["dtype"] == "bfloat16"
    full = export(run, tmp_path / "full", dtype="fp32")
    assert full["dtype"] == "float32"
    tensors = load_tensors(tmp_path / "hf")
    exact = load_tensors(tmp_path / "full")
    for name, tensor in tensors.items():
        if "e_score_correction_bias" in name:
            assert tensor.equal(exact[name]), "steps of a bias are below bf16's resolution"
        else:
            assert tensor.equal(exact[name].bfloat16()), name
    seen = plain(loaded, tmp_path / "hf", TOKENS)
    assert (seen["dtype"], seen["biases"]) == ("torch.bfloat16", {"torch.float32"})
    assert (seen["pad"], seen["length"]) == (5, 16)
    assert sorted(map(sum, seen["mask"])) == [1, 1], "a word-level tokenizer: one token a text"
    assert seen["learns padding"]
    expected = plain(loaded, tmp_path / "full", TOKENS)["logits"]
    # bf16 has 8 bits; a wrong cast would be off by the size of the logits.
    assert np.abs(seen["logits"] - expected).mean() < 0.05 * np.abs(expected).mean()


def follow_card(folder):
    """Run the card's Python, which may ask nothing; returns the ids of its message."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    scope = {}
    with mock.patch("builtins.input") as asked:
        exec(code.replace("FOLDER", str(folder)), scope)
    assert not asked.called
    ids = scope["inputs"]["input_ids"][0].tolist()
    return ids


def test_the_card_of_a_chat_model_can_be_followed(
    plain,
    tokenizer_folder,  # noqa: F811
    tmp_path,
):
    hf_to_mcore(write_released(tmp_path / "released", vocab_size=320), tmp_path / "mcore")
    export(tmp_path / "mcore", tmp_path / "plain")
    card = (tmp_path / "plain/README.md").read_text()
    assert "tokenizer" not in card.split("## Use")[1], "there is none"
    assert "Converted, not trained, by" in card
    assert (
        "constant experts mix a token with a learned vector, copy experts return it, zero" in card
    )
    assert "vLLM serves it with `--model-impl transformers" in card

    source = write(tmp_path / "chats.jsonl", [{"messages": chat(n)} for n in range(9)])
    prepared(source, tokenizer_folder, tmp_path / "data")
    file = tmp_path / "data/tokenizer.json"
    for name, content in _tokenizer_files(file).items():
        (tmp_path / "mcore" / name).write_bytes(content)
    export(tmp_path / "mcore", tmp_path / "hf")
    template = ChatTemplate.find(file, Tokenizer.load(file), None)
    text = template.prompt("Hello")
    wanted, _ = template.tokenizer.encode_with_spans(text, has_special_tokens=True)
    assert plain(follow_card, tmp_path / "hf") == wanted


def test_a_licence_that_is_none_is_refused(tmp_path, monkeypatch):
    from moepp_megatron.training.checkpoint import find

    monkeypatch.setattr(find, "find_checkpoint", lambda source: source)
    with config_error(r"--license \(my own: free\) must be an identifier"):
        mcore_to_hf(tmp_path, tmp_path / "hf", license_id="my own: free")
