"""Golden and random checkpoints in the released format, and scoring on the ranks of a test."""

import json
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("two_layer_gate", "mixtral_gate")

RELEASED = {
    "model_type": "MoE++",
    "architectures": ["MoeForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "num_experts": [8],
    "moe_expert_interval": 1,
    "moe_use_mixtral_gating": False,
    "moe_2layer_gate": False,
    "moe_use_logits_norm": False,
    "moe_gate_norm_std": 1.0,
    "moe_feature_no_mul_topk": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_released(folder, dtype="float32", **changes):
    """A checkpoint of random weights in the released format; its tensor names are spelled here."""
    import torch
    from safetensors.torch import save_file

    config = RELEASED | {"torch_dtype": dtype} | changes
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, shape in released_tensors(config).items():
        value = torch.randn(shape, generator=generator) * (shape[-1] ** -0.5)
        if "norm" in name:
            value = 1.0 + 0.1 * value
        # The released code keeps its gates in fp32 whatever the model's dtype.
        is_gate = ".gate.wg." in name
        tensors[name] = value if is_gate else value.to(getattr(torch, dtype))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def released_tensors(config):
    """Names and shapes, from the released code's modules (modeling_moe_plus_plus.py)."""
    width, inner, experts = config["hidden_size"], config["intermediate_size"], 0
    (experts,) = config["num_experts"]
    kv = width * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (width,),
            prefix + "post_attention_layernorm.weight": (width,),
            prefix + "self_attn.q_proj.weight": (width, width),
            prefix + "self_attn.k_proj.weight": (kv, width),
            prefix + "self_attn.v_proj.weight": (kv, width),
            prefix + "self_attn.o_proj.weight": (width, width),
        }
        if (layer + 1) % config["moe_expert_interval"]:
            shapes |= {
                prefix + "mlp.gate_proj.weight": (inner, width),
                prefix + "mlp.up_proj.weight": (inner, width),
                prefix + "mlp.down_proj.weight": (width, inner),
            }
            continue
        gate = prefix + "mlp.moe.gate."
        shapes[gate + "gate_map.weight"] = (experts, experts)
        if config["moe_2layer_gate"]:
            shapes[gate + "wg.0.weight"] = (8 * experts, width)
            shapes[gate + "wg.2.weight"] = (experts, 8 * experts)
        else:
            shapes[gate + "wg.weight"] = (experts, width)
        for index in range(experts - 2):
            expert = f"{prefix}mlp.moe.experts.experts.{index}."
            if index < experts - 4:
                shapes[expert + "up_proj.weight"] = (2 * inner, width)
                shapes[expert + "down_proj.weight"] = (width, inner)
            else:
                shapes[expert + "constant"] = (width,)
                shapes[expert + "wg.weight"] = (2, width)
    return shapes


def load_tensors(folder):
    """All tensors of a folder of safetensors shards, read by the safetensors library."""
    from safetensors.torch import load_file

    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        shard = load_file(file)
        assert not tensors.keys() & shard.keys(), "a tensor is in two shards"
        tensors |= shard
    return tensors


# Imported where they are called: functions of tests' modules run in a process of transformers too.
def hf_to_mcore(*args, **options):
    """`moepp convert hf-to-mcore`."""
    from moepp_megatron.interop.to_mcore import hf_to_mcore

    hf_to_mcore(*args, **options)


def mcore_to_hf(*args, **options):
    """`moepp convert mcore-to-hf`; its warnings."""
    from moepp_megatron.interop.to_hf import mcore_to_hf

    return mcore_to_hf(*args, **options)


def score(checkpoint, tokens, overrides):
    """`moepp score --logits` on the ranks that call; rank 0 returns the scores."""
    import torch.distributed as dist

    from moepp_megatron.interop.score import ScoreRequest
    from moepp_megatron.interop.scoring import score_stages, scoring_stages
    from moepp_megatron.runtime.distributed import build_groups

    out = Path("unused.npz")
    request = ScoreRequest.read(checkpoint, tokens, out, overrides, dist.get_world_size(), True)
    build_groups(request.config, request.layout)
    return score_stages(request, scoring_stages(request))


def convert_and_score(source, target, tokens, overrides):
    """Rank 0 converts, all score."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        hf_to_mcore(source, target)
    dist.barrier()
    return score(target, tokens, overrides)
