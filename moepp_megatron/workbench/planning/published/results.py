"""Published results: model TFLOP/s per GPU on H100, layout, and source."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moepp_megatron.workbench.planning.attention import GroupedQuery
from moepp_megatron.workbench.planning.grid import Grid
from moepp_megatron.workbench.planning.imbalance import FORCED_BALANCE, LEARNED, AssumedRouting
from moepp_megatron.workbench.planning.pipeline import Stages, stages_of
from moepp_megatron.workbench.planning.published.models import (
    BF16,
    BF16_GRADIENTS,
    BLOCKWISE,
    TENSORWISE,
    deepseek,
    mixtral,
    model,
    qwen_30b,
    qwen_235b,
    vanilla_experts,
)
from moepp_megatron.workbench.planning.workload import Workload


@dataclass(frozen=True)
class Published:
    """One published result.

    Attributes:
        name: Model, format and distinguishing feature.
        gpus: H100 GPUs.
        tflops: Published model TFLOP/s per GPU.
        load: The model.
        grid: Its layout.
        source: Source of the result and its settings.
        routing: Whether it was forced to balance, or learned.
        stages: Layers of the stages where they are not even.
    """

    name: str
    gpus: int
    tflops: float
    load: Workload
    grid: Grid
    source: str
    routing: AssumedRouting = FORCED_BALANCE
    stages: Stages | None = None


_ZOO = "yanring/Megatron-MoE-ModelZoo (May 2026)"
_ARCHIVE = "NVIDIA-NeMo/Megatron-Bridge, docs/performance-summary-archive.md"
_NORM_ACT = ("layernorm", "moe_act")

_MIXTRALBF16 = Published(
    name="Mixtral-8x22B bf16",
    gpus=128,
    tflops=445,
    load=mixtral(BF16),
    grid=Grid(128, tp=2, pp=8, vpp=7, ep=8),
    source=f"{_ZOO}, best_practice/mixtral and runtime.conf: routing not forced to balance",
    routing=LEARNED,
)
_QWEN_235B = Published(
    name="Qwen3-235B bf16",
    gpus=256,
    tflops=320,
    load=qwen_235b(BF16, "flex"),
    grid=Grid(256, tp=2, pp=8, vpp=4, ep=32, recompute=_NORM_ACT, expert_overlap=True),
    source=f"arXiv 2603.07685 table 11; {_ZOO}, best_practice/qwen3/run_h100_235b.sh",
)
# 62 stages of two layers, embedding and one layer in front, multi-token prediction and loss last.
_DEEPSEEK_STAGES = stages_of((1, *(2,) * 30, 0), 8)

RESULTS = (
    Published(
        name="DeepSeek-V3 FP8",
        gpus=1024,
        tflops=368,
        load=deepseek(),
        grid=Grid(
            1024,
            tp=2,
            pp=8,
            vpp=4,
            ep=64,
            recompute=("mla_up_proj", "mlp"),
            expert_overlap=True,
        ),
        source=f"arXiv 2603.07685 tables 11 and 17; {_ZOO}, best_practice/deepseek-v3",
        stages=_DEEPSEEK_STAGES,
    ),
    _QWEN_235B,
    Published(
        name="Qwen3-30B bf16",
        gpus=16,
        tflops=299,
        load=qwen_30b(BF16_GRADIENTS),
        grid=Grid(16, ep=16, expert_overlap=True),
        source="NVIDIA-NeMo/Megatron-Bridge, docs/training/moe-optimization.md (20.147 s a step)",
    ),
    _MIXTRALBF16,
    Published(
        name="Mixtral-8x22B FP8",
        gpus=128,
        tflops=560,
        load=mixtral(BLOCKWISE),
        grid=_MIXTRALBF16.grid,
        source=f"{_ZOO}, best_practice/mixtral: block-wise FP8, balance forced",
    ),
)

FURTHER = (
    replace(
        _MIXTRALBF16, name="Mixtral-8x22B bf16, balance forced", tflops=465, routing=FORCED_BALANCE
    ),
    replace(
        _QWEN_235B,
        name="Qwen3-235B bf16, no overlap",
        tflops=245,
        grid=replace(_QWEN_235B.grid, expert_overlap=False),
        source=f"{_ZOO}, best_practice/qwen3/readme.md: older software",
    ),
    replace(
        _QWEN_235B,
        name="Qwen3-235B bf16, older software",
        tflops=276,
        source=f"{_ZOO}, best_practice/qwen3/readme.md",
    ),
    replace(
        _QWEN_235B,
        name="Qwen3-235B bf16, 32k tokens, TP4 CP2 EP8",
        tflops=335,
        load=qwen_235b(BF16, "flex", 256, 32768),
        grid=Grid(256, tp=4, cp=2, pp=8, vpp=4, ep=8, recompute=("layernorm", "moe")),
        source=f"{_ZOO}, best_practice/qwen3/readme.md, long context",
    ),
    replace(
        _QWEN_235B,
        name="Qwen3-235B bf16, 128k tokens, TP4 CP8 EP8",
        tflops=389,
        load=qwen_235b(BF16, "flex", 256, 131072),
        grid=Grid(256, tp=4, cp=8, pp=8, vpp=4, ep=8, recompute=("layernorm", "moe")),
        source=f"{_ZOO}, best_practice/qwen3/readme.md, long context",
    ),
    Published(
        name="Qwen3-30B FP8 tensorwise",
        gpus=16,
        tflops=206,
        load=qwen_30b(TENSORWISE),
        grid=Grid(16, ep=16),
        source=f"{_ARCHIVE}, 26.04.01",
    ),
    Published(
        name="Llama-3 70B FP8 tensorwise",
        gpus=64,
        tflops=719,
        load=replace(
            model(
                8192,
                80,
                GroupedQuery(64, 8, 128),
                vanilla_experts(1, 1, 1),
                128256,
                128,
                TENSORWISE,
            ),
            seq=8192,
            is_moe=(False,) * 80,
            dense_size=28672,
        ),
        grid=Grid(64, tp=4, pp=8, vpp=5),
        source=f"{_ARCHIVE}, 25.11",
    ),
    Published(
        name="Llama-3.1 405B FP8 tensorwise",
        gpus=1024,
        tflops=763,
        load=replace(
            model(
                16384,
                126,
                GroupedQuery(128, 8, 128),
                vanilla_experts(1, 1, 1),
                128256,
                512,
                TENSORWISE,
            ),
            seq=8192,
            is_moe=(False,) * 126,
            dense_size=53248,
        ),
        grid=Grid(1024, tp=8, cp=2, pp=8, vpp=8),
        source=f"{_ARCHIVE}, 25.09",
    ),
)
