"""Exports for LongCat-Flash: transformers' own classes compute from them what we compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moepp_megatron.config import ConfigError, parse_config
from tests.interop.checkpoints import load_tensors
from tests.interop.conftest import RunPlain
from tests.interop.models import settings
from tests.interop.test_export import LOGITS, TOKENS, save_and_compute
from tests.parallel.ranks import RankPools

LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
}
MODEL: dict[str, Any] = {
    "latent_attention": LATENT,
    "qk_layernorm": True,
    # transformers' own in the norms of latent attention.
    "norm_epsilon": 1e-6,
}
MOE: dict[str, Any] = {
    "num_constant_experts": 0,
    "num_zero_experts": 2,
    "num_copy_experts": 3,
    "router_topk": 3,
    "gating_residual": False,
    "selection_bias": True,
    "gate_scale": 2.5,
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zero and copy experts": ({}, {}),
    "dense layer, shared expert": (
        {"num_layers": 3},
        {"layer_freq": [0, 1, 1], "shared_expert_ffn_hidden_size": 24, "ffn_hidden_size": 40},
    ),
    "wide shared expert": ({}, {"shared_expert_ffn_hidden_size": 56}),
    "no bias, tied": (
        {"tie_embeddings": True},
        {"selection_bias": False, "num_zero_experts": 0, "gate_scale": 1.0},
    ),
    "copy experts alone are none": ({}, {"num_copy_experts": 0}),
}


def longcat_logits(folder: Path, ids: Any) -> tuple[Any, set[str]]:
    """Logits of transformers' LongCat-Flash, and the names that it saves by itself."""
    import torch
    from transformers import AutoModelForCausalLM, LongcatFlashForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model) is LongcatFlashForCausalLM
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    assert not report["mismatched_keys"], report
    tokens = torch.from_numpy(ids)
    texts = [
        model.eval().generate(tokens[:1, :8], max_new_tokens=4, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*texts)
    own = folder.parent / "own"
    model.save_pretrained(own)
    with torch.no_grad():
        return model(tokens).logits.numpy(), set(load_tensors(own))


@pytest.mark.parametrize("case", CASES)
def test_longcat_flash_computes_the_same(
    ranks: RankPools, plain: RunPlain, tmp_path: Path, case: str
) -> None:
    from moepp_megatron.interop.to_hf import mcore_to_hf
    from moepp_megatron.interop.to_mcore import hf_to_mcore
    from moepp_megatron.interop.upcycle import upcycle

    model, moe = CASES[case]
    raw = settings(model=MODEL | model, moe=MOE | moe)
    (ours,) = ranks(1).run(save_and_compute, raw, tmp_path / "checkpoints")
    warnings = mcore_to_hf(tmp_path / "checkpoints", tmp_path / "hf", "longcat")
    theirs, names = plain(longcat_logits, tmp_path / "hf", TOKENS)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=LOGITS)
    assert set(load_tensors(tmp_path / "hf")) == names
    card = (tmp_path / "hf" / "README.md").read_text()
    assert 'from_pretrained("FOLDER")' in card
    assert "trust_remote_code" not in card
    assert any("second is zeros" in warning for warning in warnings)
    assert any("zero experts became FFN" in w for w in warnings) == ("tied" not in case)
    for convert in (hf_to_mcore, upcycle):
        with pytest.raises(ConfigError, match=r"\(longcat_flash\) must be .*two attentions"):
            convert(tmp_path / "hf", tmp_path / "back")


def test_norms_that_differ_are_told() -> None:
    from moepp_megatron.interop.longcat import longcat_warnings

    config = parse_config(settings(model=MODEL | {"norm_epsilon": 1e-5}, moe=MOE))
    assert any("norm_epsilon (1e-05) is not 1e-06" in w for w in longcat_warnings(config))


@pytest.mark.parametrize(
    ("model", "moe", "named"),
    [
        ({"latent_attention": None}, {}, r"model\.latent_attention \(null\).*one rotated key"),
        (
            {"latent_attention": LATENT | {"q_lora_rank": None}, "qk_layernorm": False},
            {},
            r"q_lora_rank \(null\) must be",
        ),
        ({"latent_attention": LATENT | {"rope_type": "yarn"}}, {}, r"rope_type \('yarn'\) must be"),
        ({"qk_layernorm": False}, {}, r"model\.qk_layernorm \(false\) must be true"),
        ({}, {"gating_residual": True}, "gating residuals are unknown there"),
        ({}, {"num_constant_experts": 2}, "constant experts are unknown there"),
        ({}, {"gate_normalization": "selected"}, "keeps the raw scores"),
        ({}, {"expert_input_scale": 2.0}, "it is unknown there"),
        ({}, {"layer_freq": [0, 1], "num_ffn_experts": 1, "num_zero_experts": 1}, "router_topk"),
    ],
)
def test_what_longcat_cannot_say_is_refused(
    model: dict[str, Any], moe: dict[str, Any], named: str
) -> None:
    from moepp_megatron.interop.longcat import longcat_hf_config

    longcat_hf_config(parse_config(settings(model=MODEL, moe=MOE)))
    with pytest.raises(ConfigError, match=named):
        longcat_hf_config(parse_config(settings(model=MODEL | model, moe=MOE | moe)))
