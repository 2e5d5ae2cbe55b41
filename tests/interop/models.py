"""Small models on this rank. Nothing heavy is imported at the top: tests import it by name."""

from typing import Any

from tests.parallel.training_runs import merged

BASE: dict[str, dict[str, Any]] = {
    "run": {"dir": "unused"},
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "seq_length": 16,
        "vocab_size": 64,
        # Larger than usual: routing decides by clear margins, not by the last bit.
        "init_method_std": 0.2,
    },
    "moe": {"num_ffn_experts": 4},
    "optimizer": {"lr": 1.0e-3},
    "training": {"train_iters": 1, "global_batch_size": 4, "micro_batch_size": 1, "seed": 7},
}


def settings(**sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`BASE` with some settings changed, such as `settings(moe={"tau": 0.5})`."""
    return merged(BASE, sections)


def build(raw: dict[str, dict[str, Any]]) -> list[Any]:
    """This rank's chunks of the model that `raw` describes, in its layout."""
    import torch.distributed as dist

    from moepp_megatron.config import Layout, parse_config
    from moepp_megatron.model.build import build_model
    from moepp_megatron.runtime.distributed import build_groups

    config = parse_config(raw)
    build_groups(config, Layout.from_config(config, dist.get_world_size()))
    return build_model(config)


def layer_weights(layer: Any) -> tuple[Any, Any]:
    """FFN experts' weights of a MoE layer: [F, 2H, D] and [F, D, H]."""
    import torch

    experts = layer.experts.local_experts
    return (
        torch.stack([expert.linear_fc1.weight for expert in experts]),
        torch.stack([expert.linear_fc2.weight for expert in experts]),
    )
