"""Folders as they are written go through Megatron-Bridge unchanged, and compute the same in it."""

import json

import numpy as np
import pytest

from moepp_megatron.config import ConfigError, parse_config
from moepp_megatron.interop.to_hf import mcore_to_hf
from moepp_megatron.interop.to_mcore import read_format
from tests.bridge.bridge_runs import through_bridge
from tests.interop.checkpoints import load_tensors
from tests.interop.models import settings
from tests.interop.test_export import LOGITS, TOKENS, save_and_compute
from tests.interop.test_zeda import CASES
from tests.parallel.ranks import RankError
from tests.parallel.training_runs import EP2, PP2, TP2

RELEASED = {
    "model": {"num_query_groups": 2},
    "moe": {"gate_normalization": "nonzero", "expert_input_scale": 2.0, "two_layer_gate": True},
}
# What the released format lacks.
OWN = {
    "model": {
        "num_query_groups": 2,
        "qkv_bias": True,
        "qk_layernorm": True,
        "tie_embeddings": True,
    },
    "moe": {
        "num_zero_experts": 2,
        "selection_bias": True,
        "shared_expert_ffn_hidden_size": 24,
        "shared_expert_gate": True,
        "layer_freq": [0, 1],
    },
}
# A rank's part of the padded vocabulary is as long as the vocabulary.
PADDED = TP2 | {"should_pad_vocab": True, "make_vocab_size_divisible_by": 64}
FORMATS = {"released": RELEASED, "moepp": OWN, "zeda": CASES["Qwen3, all kinds, a dense layer"]}


@pytest.mark.parametrize("layout", FORMATS)
def test_comes_back_bitwise(ranks, tmp_path, layout):
    (ours,) = ranks(1).run(save_and_compute, settings(**FORMATS[layout]), tmp_path / "run")
    source = tmp_path / "hf"
    mcore_to_hf(tmp_path / "run", source, layout)
    for number, sizes in enumerate([{}, EP2, TP2, PADDED, PP2]):
        target = tmp_path / str(number)
        ids = TOKENS if not sizes else None
        computed = ranks(2 if sizes else 1).run(through_bridge, source, target, sizes, ids)
        if not sizes:
            np.testing.assert_allclose(computed[0], ours, rtol=0, atol=LOGITS)
        if sizes == PADDED:
            (padding,) = computed[1]
            assert not padding.any()
        one, other = load_tensors(source), load_tensors(target)
        assert one.keys() == other.keys()
        assert [name for name in one if not one[name].equal(other[name])] == []
        configs = (json.loads((f / "config.json").read_text()) for f in (source, target))
        first, second = (read_format(fields, "same")[0] for fields in configs)
        assert first == second


def test_a_folder_that_lacks_a_tensor_is_refused(ranks, tmp_path):
    """Bridge by itself warns, and leaves the parameter as it was initialised."""
    from safetensors.torch import save_file

    ranks(1).run(save_and_compute, settings(**RELEASED), tmp_path / "run")
    mcore_to_hf(tmp_path / "run", tmp_path / "hf", "released")
    tensors = load_tensors(tmp_path / "hf")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RankError) as error:
        ranks(1).run(through_bridge, tmp_path / "hf", tmp_path / "back", {}, TOKENS)
    assert "tensor model.norm.weight is missing" in error.value.reasons[0]


def test_latent_attention_is_refused():
    from moepp_megatron.interop.bridge.provider import MoEPPModelProvider

    latent = {"kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8}
    config = parse_config(settings(model={"latent_attention": latent}))
    with pytest.raises(ConfigError, match="must be null for Megatron-Bridge: this package builds"):
        MoEPPModelProvider.from_config(config)
