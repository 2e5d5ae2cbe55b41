"""Results that others published, with their layouts, and what the cost model says of them.

`RESULTS` are the five that the model is judged by. `FURTHER` were measured by the same people with
other layouts, formats or software; they show how far the model carries. Routing was forced to
balance in all but one. Model FLOP are counted as `num_floating_point_operations` of Megatron-LM
does: products of the tokens' own experts, output layer and multi-token prediction included, causal scores
counted half, recomputation not. Multi-head latent attention lives here alone: no configuration of
this project has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moepp_megatron.config.hardware import load_hardware
from moepp_megatron.planning.attention import GroupedQuery, Matmul
from moepp_megatron.planning.efficiency import DEFAULT, Efficiencies
from moepp_megatron.planning.grid import Grid
from moepp_megatron.planning.imbalance import FORCED_BALANCE, LEARNED, Routing
from moepp_megatron.planning.machine import machine_of
from moepp_megatron.planning.pipeline import Stages, even_stages, stages_of
from moepp_megatron.planning.step import StepTime, step_time
from moepp_megatron.planning.workload import Dispatcher, Experts, Numbers, Workload


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1) as Megatron-LM lays it out.

    Compressions are whole on every tensor-parallel rank and see its own tokens; what they give is
    gathered, expansions are split over the ranks.

    Attributes:
        heads: Heads.
        query_rank: Width of the compressed query.
        key_rank: Width of the compressed keys and values.
        plain_dim: Width of a head's query and key without position.
        rotary_dim: Width of the part with position, shared by all heads' keys.
        v_dim: Width of a value.
    """

    heads: int
    query_rank: int
    key_rank: int
    plain_dim: int
    rotary_dim: int
    v_dim: int

    @property
    def qk_dim(self) -> int:
        """Width of a query and of a key of one head."""
        return self.plain_dim + self.rotary_dim

    def matmuls(self, hidden: int, tp: int) -> tuple[Matmul, ...]:
        """Two compressions, two expansions, the output."""
        heads = self.heads // tp
        return (
            Matmul(self.query_rank, hidden, is_sequence_parallel=True),
            Matmul(self.key_rank + self.rotary_dim, hidden, is_sequence_parallel=True),
            Matmul(heads * self.qk_dim, self.query_rank, is_up_projection=True),
            Matmul(heads * (self.plain_dim + self.v_dim), self.key_rank, is_up_projection=True),
            Matmul(hidden, heads * self.v_dim),
        )

    def norm_parameters(self) -> int:
        """Norms of the compressed vectors."""
        return self.query_rank + self.key_rank

    def gathered_width(self, hidden: int) -> int:
        """The compressed vectors."""
        return self.query_rank + self.key_rank + self.rotary_dim

    def kept_width(self, tp: int) -> int:
        """Queries, keys, values, output of the core, and the compressed vectors."""
        own = self.heads // tp * (2 * self.qk_dim + 2 * self.v_dim)
        return own + self.gathered_width(0)

    def exchanged_width(self, tp: int) -> int:
        """Keys and values."""
        return self.heads // tp * (self.qk_dim + self.v_dim)


@dataclass(frozen=True)
class Published:
    """One published result.

    Attributes:
        name: Model, format and what sets it apart.
        gpus: H100 cards.
        tflops: Published model TFLOP/s a card.
        load: The model.
        grid: Its layout.
        source: Where the result and its settings stand.
        routing: Forced to balance, or learned.
        stages: Layers of the stages where they are not even.
    """

    name: str
    gpus: int
    tflops: float
    load: Workload
    grid: Grid
    source: str
    routing: Routing = FORCED_BALANCE
    stages: Stages | None = None


@dataclass(frozen=True)
class Comparison:
    """A published result and the model's.

    Attributes:
        result: What was published.
        step: What the model says.
        tflops: Model TFLOP/s a card that follow.
    """

    result: Published
    step: StepTime
    tflops: float

    @property
    def error(self) -> float:
        """Relative: above 0 the model is too fast."""
        return self.tflops / self.result.tflops - 1.0


def compare(results: Sequence[Published], reached: Efficiencies = DEFAULT) -> list[Comparison]:
    """The model's answer for each result, all with the same efficiencies."""
    machine = machine_of(load_hardware("h100_sxm"), reached)
    comparisons = []
    for result in results:
        stages = result.stages or even_stages(result.load.layers, result.grid.pp, result.grid.vpp)
        step = step_time(result.load, result.grid, machine, result.routing, stages)
        flop = model_flop_per_token(result.load) * result.load.batch * result.load.seq
        comparisons.append(Comparison(result, step, flop / step.total / result.gpus / 1e12))
    return comparisons


def model_flop_per_token(load: Workload) -> float:
    """Model FLOP of forward and backward pass a token, Megatron-LM's count."""
    attention, experts = load.attention, load.experts
    weights = sum(m.outputs * m.inputs for m in attention.matmuls(load.hidden, 1))
    scores = load.causal_share * load.seq * attention.heads
    core = scores * (attention.qk_dim + attention.v_dim)
    per_moe = experts.ffn_per_token * 3 * load.hidden * experts.ffn_size
    per_moe += 3 * load.hidden * experts.shared_size + experts.num_all * load.hidden
    moe_layers = sum(load.is_moe) + load.extra_layers
    layers = load.layers + load.extra_layers
    total = layers * (weights + core) + moe_layers * per_moe
    total += sum(not kind for kind in load.is_moe) * 3 * load.hidden * load.dense_size
    total += load.extra_layers * 2 * load.hidden**2
    total += (1 + load.extra_layers) * load.vocab * load.hidden
    return 6.0 * total


def _model(
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


_BF16 = Numbers()
# --fp8-recipe blockwise --fp8-param-gather, Adam's moments in bf16 (Model Zoo, sbatch script).
_BLOCKWISE = Numbers(fp8="blockwise", fp8_weights=True, moment_bytes=2)
_TENSORWISE = Numbers(fp8="tensorwise")


def _mixtral(numbers: Numbers) -> Workload:
    experts = Experts(8, 0, 0, 2, 1.0, 16384)
    return _model(6144, 56, GroupedQuery(48, 8, 128), experts, 32000, 256, numbers)


def _qwen_235b(
    numbers: Numbers, dispatcher: Dispatcher, batch: int = 2048, seq: int = 4096
) -> Workload:
    experts = Experts(128, 0, 0, 8, 1.0, 1536, dispatcher=dispatcher)
    attention = GroupedQuery(64, 4, 128, has_qk_norm=True)
    return _model(4096, 94, attention, experts, 151936, batch, numbers, seq)


def _qwen_30b(numbers: Numbers) -> Workload:
    experts = Experts(128, 0, 0, 8, 1.0, 768, dispatcher="flex")
    attention = GroupedQuery(32, 4, 128, has_qk_norm=True)
    return _model(2048, 48, attention, experts, 151936, 1024, numbers)


def _deepseek() -> Workload:
    experts = Experts(256, 0, 0, 8, 1.0, 2048, shared_size=2048, dispatcher="flex")
    attention = LatentAttention(128, 1536, 512, 128, 64, 128)
    return _model(
        7168, 61, attention, experts, 129280, 8192, _BLOCKWISE, 4096, 3, 18432, extra_layers=1
    )


_ZOO = "yanring/Megatron-MoE-ModelZoo (May 2026)"
_ARCHIVE = "NVIDIA-NeMo/Megatron-Bridge, docs/performance-summary-archive.md"
_NORM_ACT = ("layernorm", "moe_act")

MIXTRAL_BF16 = Published(
    name="Mixtral-8x22B bf16",
    gpus=128,
    tflops=445,
    load=_mixtral(_BF16),
    grid=Grid(128, tp=2, pp=8, vpp=7, ep=8),
    source=f"{_ZOO}, best_practice/mixtral and runtime.conf: routing not forced to balance",
    routing=LEARNED,
)
QWEN_235B = Published(
    name="Qwen3-235B bf16",
    gpus=256,
    tflops=320,
    load=_qwen_235b(_BF16, "flex"),
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
        load=_deepseek(),
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
    QWEN_235B,
    Published(
        name="Qwen3-30B bf16",
        gpus=16,
        tflops=299,
        load=_qwen_30b(_BF16),
        grid=Grid(16, ep=16, expert_overlap=True),
        source="NVIDIA-NeMo/Megatron-Bridge, docs/training/moe-optimization.md (20.147 s a step)",
    ),
    MIXTRAL_BF16,
    Published(
        name="Mixtral-8x22B FP8",
        gpus=128,
        tflops=560,
        load=_mixtral(_BLOCKWISE),
        grid=MIXTRAL_BF16.grid,
        source=f"{_ZOO}, best_practice/mixtral: block-wise FP8, balance forced",
    ),
)

FURTHER = (
    replace(
        MIXTRAL_BF16, name="Mixtral-8x22B bf16, balance forced", tflops=465, routing=FORCED_BALANCE
    ),
    replace(
        QWEN_235B,
        name="Qwen3-235B bf16, no overlap",
        tflops=245,
        grid=replace(QWEN_235B.grid, expert_overlap=False),
        source=f"{_ZOO}, best_practice/qwen3/readme.md: older software",
    ),
    replace(
        QWEN_235B,
        name="Qwen3-235B bf16, older software",
        tflops=276,
        source=f"{_ZOO}, best_practice/qwen3/readme.md",
    ),
    replace(
        QWEN_235B,
        name="Qwen3-235B bf16, 32k tokens, TP4 CP2 EP8",
        tflops=335,
        load=_qwen_235b(_BF16, "flex", 256, 32768),
        grid=Grid(256, tp=4, cp=2, pp=8, vpp=4, ep=8, recompute=("layernorm", "moe")),
        source=f"{_ZOO}, best_practice/qwen3/readme.md, long context",
    ),
    replace(
        QWEN_235B,
        name="Qwen3-235B bf16, 128k tokens, TP4 CP8 EP8",
        tflops=389,
        load=_qwen_235b(_BF16, "flex", 256, 131072),
        grid=Grid(256, tp=4, cp=8, pp=8, vpp=4, ep=8, recompute=("layernorm", "moe")),
        source=f"{_ZOO}, best_practice/qwen3/readme.md, long context",
    ),
    Published(
        name="Qwen3-30B FP8 tensorwise",
        gpus=16,
        tflops=206,
        load=_qwen_30b(_TENSORWISE),
        grid=Grid(16, ep=16),
        source=f"{_ARCHIVE}, 26.04.01",
    ),
    Published(
        name="Llama-3 70B FP8 tensorwise",
        gpus=64,
        tflops=719,
        load=replace(
            _model(
                8192,
                80,
                GroupedQuery(64, 8, 128),
                Experts(1, 0, 0, 1, 1.0, 1),
                128256,
                128,
                _TENSORWISE,
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
            _model(
                16384,
                126,
                GroupedQuery(128, 8, 128),
                Experts(1, 0, 0, 1, 1.0, 1),
                128256,
                512,
                _TENSORWISE,
            ),
            seq=8192,
            is_moe=(False,) * 126,
            dense_size=53248,
        ),
        grid=Grid(1024, tp=8, cp=2, pp=8, vpp=8),
        source=f"{_ARCHIVE}, 25.09",
    ),
)
