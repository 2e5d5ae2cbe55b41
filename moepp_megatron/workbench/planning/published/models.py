"""The published models, from the sizes in their configurations."""

from __future__ import annotations

from moepp_megatron.experts import FFN_ONLY
from moepp_megatron.workbench.planning.attention import GroupedQuery
from moepp_megatron.workbench.planning.latent_attention import LatentAttention
from moepp_megatron.workbench.planning.workload import Dispatcher, Experts, Numbers, Workload


def model(
    hidden: int,
    layers: int,
    attention: GroupedQuery | LatentAttention,
    experts: Experts,
    vocab: int,
    batch: int,
    numbers: Numbers,
    seq: int = 4096,
    dense_layers: int = 0,
    dense_size: int = 0,
    extra_layers: int = 0,
) -> Workload:
    """A decoder from its sizes."""
    return Workload(
        hidden=hidden,
        vocab=vocab,
        seq=seq,
        is_moe=(False,) * dense_layers + (True,) * (layers - dense_layers),
        dense_size=dense_size,
        attention=attention,
        experts=experts,
        tied=False,
        batch=batch,
        numbers=numbers,
        extra_layers=extra_layers,
    )


BF16 = Numbers()
# --fp8-recipe blockwise --fp8-param-gather, Adam's moments in bf16 (Model Zoo, sbatch script).
BLOCKWISE = Numbers(fp8="blockwise", fp8_weights=True, moment_bytes=2)
TENSORWISE = Numbers(fp8="tensorwise")
# grad_reduce_in_fp32 false (Megatron-Bridge, recipes/qwen/h100/qwen3_moe.py).
BF16_GRADIENTS = Numbers(gradient_bytes=2)


def vanilla_experts(
    count: int, topk: int, size: int, shared: int = 0, dispatcher: Dispatcher = "alltoall"
) -> Experts:
    """FFN experts alone, `topk` a token."""
    return Experts(
        num_ffn_experts=count,
        router_topk=topk,
        ffn_share=1.0,
        ffn_size=size,
        shared_size=shared,
        dispatcher=dispatcher,
        gating_residual=False,
        **FFN_ONLY,
    )


def mixtral(numbers: Numbers) -> Workload:
    """Mixtral-8x22B."""
    experts = vanilla_experts(8, 2, 16384)
    return model(6144, 56, GroupedQuery(48, 8, 128), experts, 32000, 256, numbers)


def qwen_235b(
    numbers: Numbers, dispatcher: Dispatcher, batch: int = 2048, seq: int = 4096
) -> Workload:
    """Qwen3-235B-A22B."""
    experts = vanilla_experts(128, 8, 1536, dispatcher=dispatcher)
    attention = GroupedQuery(64, 4, 128, has_qk_norm=True)
    return model(4096, 94, attention, experts, 151936, batch, numbers, seq)


def qwen_30b(numbers: Numbers) -> Workload:
    """Qwen3-30B-A3B."""
    experts = vanilla_experts(128, 8, 768, dispatcher="flex")
    attention = GroupedQuery(32, 4, 128, has_qk_norm=True)
    return model(2048, 48, attention, experts, 151936, 1024, numbers)


def deepseek() -> Workload:
    """DeepSeek-V3 with one layer of multi-token prediction, as trained with blockwise FP8."""
    experts = vanilla_experts(256, 8, 2048, 2048, "flex")
    attention = LatentAttention(128, 1536, 512, 128, 64, 128)
    return model(
        7168, 61, attention, experts, 129280, 8192, BLOCKWISE, 4096, 3, 18432, extra_layers=1
    )
