"""`moepp bench dispatch`: bytes that leave a rank, and the time of dispatch and combine.

All ranks form one expert-parallel group. Three dispatchers take turns on the same tokens, so that
other load on the machine affects all alike:

    vanilla  megatron-core's all-to-all where all K selections of a token are FFN experts
    plain    `moe.dispatcher: alltoall`, the share phi of the selections, drawn at random
    dedup    `moe.dispatcher: alltoall_dedup`, the same selections as plain

Nothing is computed between dispatch and combine, so nothing hides the network's time: the result
is the full cost. Bytes are counted where they are handed to `all_to_all_single` and must
equal those that the routing demands.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from moepp_megatron.config import Layout, parse_config
from moepp_megatron.model.megatron_config import params_dtype, transformer_config
from moepp_megatron.moe.dispatcher import build_dispatcher
from moepp_megatron.runtime.distributed import build_groups
from moepp_megatron.runtime.patches import replaced

PARTS = ("dispatch", "combine", "dispatch_backward", "combine_backward")


@dataclass(frozen=True)
class DispatchSetting:
    """Settings of the measurement.

    Attributes:
        tokens: Tokens of each rank.
        hidden_size: D.
        experts: FFN experts of all ranks.
        topk: K.
        phi: FFN experts' share of all selections.
        dtype: "fp32" or "bf16".
    """

    tokens: int = 2048
    hidden_size: int = 768
    experts: int = 8
    topk: int = 2
    phi: float = 0.6
    dtype: str = "fp32"


@dataclass(frozen=True)
class DispatchResult:
    """The cost of one dispatcher.

    Attributes:
        dispatcher: "vanilla", "plain" or "dedup".
        ep: Ranks of the group.
        vector_bytes: Hidden vectors' bytes that leave rank 0 in one forward pass.
        formula_bytes: 2 T K phi D w (EP - 1) / EP, the mean of the plain dispatcher.
        metadata_bytes: Bytes of everything else.
        parts_ms: Median milliseconds per part, of the slowest rank.
        total_ms: Median milliseconds of all parts.
        time_of_vanilla: Median ratio to vanilla within a round.
    """

    dispatcher: str
    ep: int
    vector_bytes: int
    formula_bytes: float
    metadata_bytes: int
    parts_ms: dict[str, float] = field(default_factory=dict)
    total_ms: float = 0.0
    time_of_vanilla: float = 1.0


def run_dispatch_benchmark(
    setting: DispatchSetting, rounds: int, warmup: int = 3
) -> list[DispatchResult]:
    """One result per dispatcher; every rank must call, groups must not exist yet."""
    variants, dtype = _variants(setting)
    shape = (setting.tokens, 1, setting.hidden_size)
    hidden = torch.randn(shape, dtype=dtype, device=torch.cuda.current_device())
    with SentBytes(setting.hidden_size).counting() as sent:
        for index in range(warmup + rounds):
            first = index % len(variants)
            for variant in variants[first:] + variants[:first]:
                times = variant.round(hidden, sent)
                if index >= warmup:
                    for part, seconds in times.items():
                        variant.times[part].append(seconds)
    return [_result(variant, variants[0], setting, hidden.element_size()) for variant in variants]


def _result(
    variant: _Variant, vanilla: _Variant, setting: DispatchSetting, width: int
) -> DispatchResult:
    ranks, row = dist.get_world_size(), setting.hidden_size * width
    wanted = variant.vectors_wanted() * row
    assert variant.vectors == wanted, f"{variant.name} sent {variant.vectors} bytes, not {wanted}"
    mine, theirs = (
        [sum(parts) for parts in zip(*r.times.values(), strict=True)] for r in (variant, vanilla)
    )
    share = 1.0 if variant.name == "vanilla" else setting.phi
    return DispatchResult(
        dispatcher=variant.name,
        ep=ranks,
        vector_bytes=variant.vectors,
        formula_bytes=2 * setting.tokens * setting.topk * share * row * (1 - 1 / ranks),
        metadata_bytes=variant.metadata,
        parts_ms={part: statistics.median(variant.times[part]) * 1e3 for part in PARTS},
        total_ms=statistics.median(mine) * 1e3,
        time_of_vanilla=statistics.median(m / t for m, t in zip(mine, theirs, strict=True)),
    )


def draw_selections(setting: DispatchSetting, phi: float) -> Tensor:
    """[T, F] bool: the share `phi` of T * K selections, exactly, goes to FFN experts.

    Which of a token's K selections these are and which experts they take is uniformly random.
    """
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens, topk = setting.tokens, setting.topk
    is_ffn = torch.zeros(tokens * topk, dtype=torch.bool)
    is_ffn[torch.randperm(tokens * topk, generator=generator)[: round(phi * tokens * topk)]] = True
    order = torch.rand(tokens, setting.experts, generator=generator).argsort(dim=1)
    selected = order.argsort(dim=1) < is_ffn.view(tokens, topk).sum(dim=1, keepdim=True)
    return selected.to(torch.cuda.current_device())


class SentBytes:
    """Counts what this rank hands to all-to-alls for other ranks.

    Attributes:
        vectors: Bytes of hidden vectors.
        metadata: Bytes of everything else.
    """

    def __init__(self, hidden_size: int) -> None:
        self._hidden_size = hidden_size
        self._original = dist.all_to_all_single
        self.reset()

    def reset(self) -> None:
        """Forget everything counted."""
        self.vectors = self.metadata = 0

    @contextmanager
    def counting(self) -> Iterator[SentBytes]:
        """Count while the block runs."""
        with replaced(dist, all_to_all_single=self._counted):
            yield self

    def _counted(self, output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        # A list or an array, by the caller.
        send = kwargs["input_split_sizes"] if "input_split_sizes" in kwargs else args[1]
        rows = sum(send) - send[dist.get_rank()]
        num_bytes = int(rows) * input[0:1].numel() * input.element_size() if len(input) else 0
        if input.shape[1:] == (self._hidden_size,):
            self.vectors += num_bytes
        else:
            self.metadata += num_bytes
        return self._original(output, input, *args, **kwargs)


@dataclass
class _Variant:
    """A dispatcher, the selections that it carries out, and its measurements.

    Attributes:
        vectors: Bytes of hidden vectors that leave this rank in a forward pass.
        metadata: Bytes of everything else.
        times: Seconds of each part on the slowest rank, one entry per round.
    """

    name: str
    dispatcher: Any
    selected: Tensor
    vectors: int = 0
    metadata: int = 0

    def __post_init__(self) -> None:
        """Start without times."""
        self.times: dict[str, list[float]] = {part: [] for part in PARTS}

    def round(self, hidden: Tensor, sent: SentBytes) -> dict[str, float]:
        """Dispatch and combine once, forward and backward."""
        dispatcher, times = self.dispatcher, {}
        hidden = hidden.detach().requires_grad_()
        gates = self.selected.float().requires_grad_()
        sent.reset()

        def dispatch() -> tuple[Tensor, Tensor]:
            rows = dispatcher.dispatch_preprocess(hidden, self.selected, gates)
            batch, _, weights = dispatcher.dispatch_postprocess(*dispatcher.token_dispatch(*rows))
            return batch, weights

        def combine() -> Tensor:
            rows = dispatcher.token_combine(dispatcher.combine_preprocess(outputs))
            return dispatcher.combine_postprocess(rows)

        (batch, weights), times["dispatch"] = _timed(dispatch)
        outputs = batch.detach().requires_grad_()
        combined, times["combine"] = _timed(combine)
        self.vectors, self.metadata = sent.vectors, sent.metadata
        (grad,), times["combine_backward"] = _timed(
            lambda: torch.autograd.grad(combined, outputs, torch.ones_like(combined))
        )
        _, times["dispatch_backward"] = _timed(
            lambda: torch.autograd.grad(
                (batch, weights), (hidden, gates), (grad, torch.ones_like(weights))
            )
        )
        return times

    def vectors_wanted(self) -> int:
        """Number of vectors that must leave this rank, by the dispatcher's rule."""
        ranks, rank = dist.get_world_size(), dist.get_rank()
        by_rank = self.selected.view(len(self.selected), ranks, -1)
        count = by_rank.any(dim=2).long() if self.name == "dedup" else by_rank.sum(dim=2)
        table = count.new_empty(ranks * ranks)
        dist.all_gather_into_tensor(table, count.sum(dim=0))
        table = table.view(ranks, ranks).fill_diagonal_(0)
        return int(table[rank].sum() + table[:, rank].sum())


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of the work, and its seconds on the slowest rank."""
    dist.barrier()
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - started, device=torch.cuda.current_device())
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return result, seconds.item()


def _variants(setting: DispatchSetting) -> tuple[list[_Variant], torch.dtype]:
    """The three dispatchers on one expert-parallel group of all ranks."""
    ranks = dist.get_world_size()
    config = parse_config(
        {
            "run": {"dir": "unused"},
            "model": {
                "num_layers": 1,
                "hidden_size": setting.hidden_size,
                "ffn_hidden_size": setting.hidden_size,
                "num_attention_heads": 1,
                "seq_length": setting.tokens,
                "vocab_size": 64,
            },
            "moe": {"num_ffn_experts": setting.experts, "router_topk": setting.topk},
            "parallel": {"expert_model_parallel_size": ranks},
            "precision": {"dtype": setting.dtype},
            "optimizer": {"lr": 1e-3},
            "training": {"train_iters": 1, "global_batch_size": ranks, "micro_batch_size": 1},
        }
    )
    build_groups(config, Layout.from_config(config, ranks))
    local = setting.experts // ranks
    indices = [dist.get_rank() * local + index for index in range(local)]
    megatron, groups = transformer_config(config), ProcessGroupCollection.use_mpu_process_groups()
    every, some = (draw_selections(setting, phi) for phi in (1.0, setting.phi))
    vanilla = MoEAlltoAllTokenDispatcher(local, indices, megatron, groups)
    plain, dedup = (
        build_dispatcher(local, indices, megatron, groups, deduplicate=deduplicate)
        for deduplicate in (False, True)
    )
    variants = [
        _Variant("vanilla", vanilla, every),
        _Variant("plain", plain, some),
        _Variant("dedup", dedup, some),
    ]
    return variants, params_dtype(config)
