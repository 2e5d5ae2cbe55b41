"""Upcycled checkpoints compute what their sources compute, and then learn to use what was added."""

import json

import numpy as np
import pytest

from moepp_megatron.experts import FFN_ONLY
from tests.interop.checkpoints import hf_to_mcore, mcore_to_hf, score
from tests.parallel.training_runs import join
from tests.refusals import config_error

# The tolerance for the function at step 0.
SAME = 1e-5

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    # Large: routing with clear margins, logits far from uniform.
    "initializer_range": 0.2,
}
QWEN2 = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
    "mlp_only_layers": [0],
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "num_mtp_layers": 0,
}
SOURCES = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "head_dim": 16,
            "mlp_only_layers": [1],
        },
    ),
    "qwen2-moe": ("Qwen2Moe", QWEN2 | {"norm_topk_prob": True}),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "deepseek-v3": ("DeepseekV3", DEEPSEEK),
    # Sigmoid and bias are positive: transformers masks other groups' experts with 0.
    "deepseek-v3, groups": (
        "DeepseekV3",
        DEEPSEEK | {"n_routed_experts": 8, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2},
    ),
    "deepseek-v3, yarn": (
        "DeepseekV3",
        DEEPSEEK
        | {
            "n_shared_experts": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 0.7,
                "mscale_all_dim": 1.0,
            },
        },
    ),
}


def write_source(folder, name, tokens, normalised=None, **changes):
    """Save a random model of transformers' own class; returns its logits."""
    changes |= {} if normalised is None else {"norm_topk_prob": normalised}
    import torch
    import transformers

    family, fields = SOURCES[name]
    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(**(SHAPE | fields | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.copy_(1.0 + 0.3 * torch.randn_like(parameter))
            if key.endswith(".bias"):
                parameter.copy_(torch.randn_like(parameter))
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn_like(buffer).abs())
        logits = model(torch.from_numpy(np.load(tokens)["input_ids"])).logits
    model.save_pretrained(folder)
    return logits.numpy()


def write_tokens(folder):
    tokens = folder / "tokens.npz"
    np.savez(tokens, input_ids=np.random.default_rng(0).integers(0, 64, (4, 32)))
    return tokens


def upcycle_and_score(source, target, tokens, changes):
    """Scores of the upcycled model, and its FFN experts' share of all selections."""
    from moepp_megatron.config import load_config
    from moepp_megatron.interop import scoring
    from moepp_megatron.interop.upcycle import Additions, upcycle
    from moepp_megatron.moe.layer import MoEPPLayer

    upcycle(source, target, Additions(**changes))
    maps = []
    build = scoring.build_model

    def build_watched(config):
        models = build(config)
        for module in models[0].modules():
            if isinstance(module, MoEPPLayer):
                module.router.register_forward_hook(
                    lambda router, inputs, routing: maps.append(routing.routing_map)
                )
        return models

    scoring.build_model = build_watched
    try:
        scores = score(target, tokens, [])
    finally:
        scoring.build_model = build
    num_ffn = load_config(target / "config.yaml").moe.num_ffn_experts
    selected = sum(int(m.sum()) for m in maps)
    return scores["logits"], sum(int(m[:, :num_ffn].sum()) for m in maps) / selected


@pytest.mark.parametrize("name", SOURCES)
def test_same_function_at_step_0(on_one_rank, plain, tmp_path, name):
    tokens = write_tokens(tmp_path)
    expected = plain(write_source, tmp_path / "hf", name, tokens)
    logits, ffn_share = on_one_rank(
        upcycle_and_score, tmp_path / "hf", tmp_path / "moepp", tokens, {}
    )
    assert ffn_share == 1.0
    assert np.abs(expected).max() > 1.0, "a model that says nothing would be the same as any"
    np.testing.assert_allclose(logits, expected, rtol=0, atol=SAME * np.abs(expected).max())


def test_bias_bounds_every_score_of_an_added_expert():
    """Worst tokens: those that point along an added row, away from the FFN rows."""
    import torch

    from moepp_megatron.interop.upcycle import _new_rows, _selection_bias
    from moepp_megatron.model.initialize import seeded_noise

    ffn, norm = 0.3 * seeded_noise(1, "ffn", (5, 24)), 1.0 + 0.5 * seeded_noise(1, "norm", (24,))
    rows = torch.cat([ffn, _new_rows(ffn, norm, seeded_noise(1, "added", (3, 24)))])
    bias = _selection_bias(rows, norm, 5)
    directions = torch.cat([norm * (rows[5:] - ffn.mean(dim=0)), seeded_noise(1, "u", (2000, 24))])
    u = directions / directions.norm(dim=-1, keepdim=True) * 24**0.5
    scores = torch.softmax((norm * u) @ rows.T, dim=-1)
    assert (scores[:, 5:].amax(dim=-1) < bias[0] + scores[:, :5].amin(dim=-1)).all()
    # And not by much: a bias of half that size would be wrong for some token.
    assert float(scores[:, 5:].max()) > 0.5 * float(bias[0])


@pytest.mark.parametrize("name", ["qwen2-moe", "qwen3-moe", "olmoe"])
def test_raw_scores_as_gates(on_one_rank, plain, tmp_path, name):
    """Without new experts the same; with them gates shrink, within the stated bound."""
    tokens = write_tokens(tmp_path)
    expected = plain(write_source, tmp_path / "hf", name, tokens, False)
    none = {f"num_{kind}_experts": 0 for kind in ("zero", "copy", "constant")}
    same, _ = on_one_rank(upcycle_and_score, tmp_path / "hf", tmp_path / "a", tokens, none)
    np.testing.assert_allclose(same, expected, rtol=0, atol=SAME * np.abs(expected).max())

    more = {"approximate": True, "num_copy_experts": 0, "num_constant_experts": 0}
    near, ffn_share = on_one_rank(upcycle_and_score, tmp_path / "hf", tmp_path / "b", tokens, more)
    assert ffn_share == 1.0
    change = np.abs(near - expected).mean() / np.abs(expected).mean()
    # One expert beside six: gates shrink to no less than 1 / (1 + 1.25 / 6) = 0.83.
    assert 1e-3 < change < 0.17


def test_zedas_router_rows(plain, tmp_path):
    """As the FFN experts' are, and no bias holds them back."""
    from moepp_megatron.interop.checkpoint_tensors import TensorReader
    from moepp_megatron.interop.upcycle import Additions, _upcycled_config, upcycle

    plain(write_source, tmp_path / "hf", "mixtral", write_tokens(tmp_path))
    added = Additions(num_zero_experts=8, keeps_function=False)
    assert upcycle(tmp_path / "hf", tmp_path / "moepp", added).moe.budget.controller is None
    start = TensorReader(tmp_path / "moepp")
    rows = start.read("decoder.layers.1.mlp.router.weight")
    assert not any("expert_bias" in key for key in start.tensors)
    assert 0.5 < float(rows[4:].std() / rows[:4].std()) < 2.0
    with config_error("--zeda-router must be left out for a deepseek_v3"):
        _upcycled_config({**SHAPE, **DEEPSEEK, "model_type": "deepseek_v3"}, added, "m", None)


def test_scores_that_are_not_renormalised_are_refused(plain, tmp_path):
    from moepp_megatron.interop.upcycle import upcycle

    source, tokens = tmp_path / "hf", write_tokens(tmp_path)
    plain(write_source, source, "qwen3-moe", tokens)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "norm_topk_prob": False}))
    # 6 / (6 + 4 * 1.25)
    with config_error(r"norm_topk_prob \(false\) must be true.*0\.545 of"):
        upcycle(source, tmp_path / "moepp")
    (source / "config.json").write_text(json.dumps({**config, "model_type": "gemma"}))
    with config_error(r"model_type \(gemma\)"):
        upcycle(source, tmp_path / "moepp")


LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "vocab_size": 64,
}


def test_one_expert_a_token_is_refused_with_advice_that_can_be_followed():
    from moepp_megatron.interop.upcycle import Additions, _upcycled_config

    with config_error(r"--topk \(1\) must be at least 2.*; use --topk 2"):
        _upcycled_config(LLAMA, Additions(router_topk=1), "model", None)
    assert _upcycled_config(LLAMA, Additions(router_topk=2), "model", None).moe.router_topk == 2
    mixtral = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 1}
    with config_error(r"num_experts_per_tok \(1\) .* cannot be upcycled"):
        _upcycled_config(mixtral, Additions(), "model", None)


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ({"model_type": "moepp"}, "a MoE.. model already.*moepp convert hf-to-mcore"),
        ({"model_type": "MoE++"}, "a MoE.. model already.*moepp convert hf-to-mcore"),
        ({"model_type": "qwen3_moe", "zce_nums": [4]}, "a MoE.. model already.*hf-to-mcore"),
        ({"model_type": "gpt2"}, "must be one of llama, .*cannot be upcycled"),
    ],
)
def test_a_model_of_another_kind_is_refused_with_what_is_possible(kind, remedy):
    from moepp_megatron.interop.upcycle_sources import SourceKind

    with config_error(remedy):
        SourceKind.of({**LLAMA, **kind})


def train_upcycled(source, target, steps):
    """Losses and FFN shares of a short run from the upcycled checkpoint, and phi."""
    import torch.distributed as dist

    from moepp_megatron.config import load_config, with_overrides
    from moepp_megatron.features.budget.part import BudgetPart
    from moepp_megatron.interop.upcycle import Additions, upcycle
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.checkpoint.read import read_checkpoint
    from moepp_megatron.training.parts.routing_counts import RoutingCountsPart
    from moepp_megatron.training.setup import build_training_model
    from moepp_megatron.training.step import training_step
    from moepp_megatron.training.step_sums import mean_loss
    from tests.parallel.training_runs import SyntheticDataset

    if dist.get_rank() == 0:
        upcycle(source, target, Additions(tau=0.5))
    dist.barrier()
    overrides = [f"training.train_iters={steps}", "training.global_batch_size=8"]
    overrides += ["training.micro_batch_size=4"]
    overrides += ["optimizer.lr=0.001", "optimizer.decay_style=constant", "model.seq_length=16"]
    overrides += ["parallel.expert_model_parallel_size=2"]
    config = with_overrides(load_config(target / "config.yaml"), overrides)
    layout = join(config)
    model = build_training_model(config)
    read_checkpoint(target, model, config)
    model.set_training(True)
    collector = RoutingCountsPart(model, config, layout)
    batches = rank_batches(SyntheticDataset(config, steps), 0, config, 1)
    budget = BudgetPart(config, model, collector)
    losses, shares = [], []
    for step in range(1, steps + 1):
        collector.reset()
        budget.begin_step(step, layout)
        result = training_step(model, batches, config, layout)
        budget.learn(step)
        losses.append(mean_loss(result.losses))
        shares.append(float(collector.collect()["ffn_fraction"]))
    return losses, shares, config.moe.ffn_share


def test_short_run_moves_the_ffn_share_from_1_towards_phi(ranks, plain, tmp_path):
    plain(write_source, tmp_path / "hf", "mixtral", write_tokens(tmp_path))
    runs = ranks(2).run(train_upcycled, tmp_path / "hf", tmp_path / "moepp", 60)
    (losses, shares, phi), other = runs
    assert (losses, shares) == (other[0], other[1]), "ranks disagree"
    assert shares[0] == 1.0
    last = np.mean(shares[-10:])
    assert abs(last - phi) < 0.25 * (1.0 - phi), f"share {last}, phi {phi}"
    # The loss does not jump where new experts come into use: from each ten steps to the next its
    # mean falls, or rises by no more than batches differ.
    tens = np.array(losses).reshape(-1, 10).mean(axis=1)
    assert (np.diff(tens) < 0.05).all(), tens
    assert tens[-1] < tens[0] - 0.3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_group": 2, "topk_group": 1}, r"topk_group \(1\) must be such that .* down is 2: Deep"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config .*bf16 first"),
        ({"q_lora_rank": None}, r"q_lora_rank \(null\) must be a width"),
        ({"rms_norm_eps": 1e-5}, r"rms_norm_eps \(1e-05\) must be 1e-06"),
        ({"rope_interleave": False}, r"rope_interleave \(false\) must be true"),
        ({"rope_parameters": {"rope_type": "llama3"}}, r"rope_type \(llama3\) must be default or"),
        ({"scoring_func": "softmax"}, r"scoring_func \('softmax'\) must be 'sig"),
        ({"norm_topk_prob": False}, r"norm_topk_prob \(false\) must be true"),
        ({"attention_bias": True}, r"attention_bias \(true\) must be false"),
    ],
)
def test_what_deepseek_models_cannot_bring_is_refused(change, named):
    from moepp_megatron.interop.upcycle import Additions, _upcycled_config

    config = {**SHAPE, **DEEPSEEK, "model_type": "deepseek_v3", "rms_norm_eps": 1e-6}
    assert _upcycled_config(config, Additions(), "x", None).moe.gate_scale == 2.5
    # All groups stay: nothing is limited.
    _upcycled_config(config | {"n_group": 2, "topk_group": 2}, Additions(), "x", None)
    with config_error(named):
        _upcycled_config(config | change, Additions(), "x", None)


def test_what_olmoe_models_cannot_bring_is_refused():
    from moepp_megatron.interop.upcycle import Additions, _upcycled_config

    none = Additions(**FFN_ONLY)
    olmoe = {**SHAPE, "model_type": "olmoe", "num_experts": 6, "num_experts_per_tok": 3}
    config = _upcycled_config(olmoe | {"clip_qkv": None}, none, "x", None)
    assert (config.model.qk_layernorm, config.model.qk_layernorm_scope) == (True, "all_heads")
    # What OLMoE takes where its config.json does not say.
    assert (config.model.norm_epsilon, config.moe.gate_normalization) == (1e-5, "none")
    with config_error(r"clip_qkv \(8\.0\) must be null"):
        _upcycled_config(olmoe | {"clip_qkv": 8.0}, none, "x", None)
    with config_error(r"attention_bias \(true\) must be false"):
        _upcycled_config(olmoe | {"attention_bias": True}, none, "x", None)
    with config_error(r"norm_topk_prob \(false\) must be true"):
        _upcycled_config(olmoe, Additions(), "x", None)


def test_olmoes_norms_come_back_from_an_export(plain, tmp_path):
    from moepp_megatron.config import load_config
    from moepp_megatron.interop.upcycle import upcycle
    from tests.interop.checkpoints import load_tensors

    plain(write_source, tmp_path / "hf", "olmoe", write_tokens(tmp_path))
    upcycle(tmp_path / "hf", tmp_path / "a")
    mcore_to_hf(tmp_path / "a", tmp_path / "export")
    hf_to_mcore(tmp_path / "export", tmp_path / "b")
    models = [load_config(tmp_path / folder / "config.yaml").model for folder in "ab"]
    # Exports say how wide a head is.
    assert models[1] == models[0].model_copy(update={"kv_channels": 8})
    assert models[1].qk_layernorm_scope == "all_heads"
    mcore_to_hf(tmp_path / "b", tmp_path / "again")
    source, first, again = (load_tensors(tmp_path / name) for name in ("hf", "export", "again"))
    assert first.keys() == again.keys()
    assert all(first[name].equal(again[name]) for name in first)
    for kind, width in (("q", 32), ("k", 16)):
        name = f"model.layers.1.self_attn.{kind}_norm.weight"
        assert first[name].shape == (width,)
        assert first[name].equal(source[name])


def test_layers_that_predict_further_tokens_are_left_out(plain, tmp_path):
    from safetensors.torch import save_file

    from moepp_megatron.interop.upcycle import upcycle
    from tests.interop.checkpoints import load_tensors

    source = tmp_path / "hf"
    plain(write_source, source, "deepseek-v3", write_tokens(tmp_path))
    tensors = load_tensors(source)
    more = tensors["model.layers.2.mlp.gate.weight"].clone()
    save_file(tensors | {"model.layers.3.eh_proj.weight": more}, source / "model.safetensors")
    upcycle(source, tmp_path / "moepp", dtype="bf16")
    save_file(tensors | {"model.surprise": more}, source / "model.safetensors")
    with config_error(r"model\.surprise is unexpected"):
        upcycle(source, tmp_path / "other")

    import torch

    from moepp_megatron.interop.checkpoint_tensors import TensorReader

    bias = TensorReader(tmp_path / "moepp").read("decoder.layers.1.mlp.router.expert_bias")
    own = tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert torch.equal(bias[:6], own), "bf16 does not resolve a bias"
    assert float(bias[6:].max()) < float(own.min()) - 1.0
