"""What dispatch and combine cost: bytes that leave a rank, and time, forward and backward.

Run under torchrun; all ranks form one expert-parallel group:

    torchrun --standalone --nproc-per-node 2 benchmarks/dispatch.py --topk 2 --phi 0.6

Three dispatchers take turns on the same tokens, so that what else the machine does meets all alike:

    vanilla  megatron-core's all-to-all where all K selections of a token are FFN experts
    plain    `moe.dispatcher: alltoall`, the share phi of the selections, drawn at random
    dedup    `moe.dispatcher: alltoall_dedup`, the same selections as plain

Nothing is computed between dispatch and combine, so nothing hides the time of the network: this is
the cost, not the overlap. Bytes are counted where they are handed to `all_to_all_single` and must
equal those that the routing asks for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PARTS = ("dispatch", "combine", "dispatch backward", "combine backward")
# Without a GPU `moepp_megatron.runtime.cpu_support` makes `torch.cuda.synchronize` do nothing.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def draw_selections(arguments: argparse.Namespace, phi: float) -> Tensor:
    """[T, F] bool: the share `phi` of T * K selections, exactly, goes to FFN experts.

    Which of a token's K selections these are and which experts they take is uniformly random.
    """
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens, topk = arguments.tokens, arguments.topk
    is_ffn = torch.zeros(tokens * topk, dtype=torch.bool)
    is_ffn[torch.randperm(tokens * topk, generator=generator)[: round(phi * tokens * topk)]] = True
    order = torch.rand(tokens, arguments.experts, generator=generator).argsort(dim=1)
    selected = order.argsort(dim=1) < is_ffn.view(tokens, topk).sum(dim=1, keepdim=True)
    return selected.to(DEVICE)


class SentBytes:
    """Counts what this rank hands to all-to-alls for other ranks."""

    def __init__(self, hidden_size: int) -> None:
        self._hidden_size = hidden_size
        self._original = dist.all_to_all_single
        dist.all_to_all_single = self._counted
        self.reset()

    def reset(self) -> None:
        """Forget everything counted."""
        self.vectors = self.metadata = 0

    def _counted(self, output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        send = kwargs.get("input_split_sizes", args[1] if len(args) > 1 else None)
        rows = sum(send) - send[dist.get_rank()]
        num_bytes = int(rows) * input[0:1].numel() * input.element_size() if len(input) else 0
        if input.shape[1:] == (self._hidden_size,):
            self.vectors += num_bytes
        else:
            self.metadata += num_bytes
        return self._original(output, input, *args, **kwargs)


@dataclass
class Contestant:
    """A dispatcher, the selections that it carries out, and what was measured of it.

    Attributes:
        vectors: Bytes of hidden vectors that leave this rank in a forward pass.
        metadata: Bytes of everything else.
        times: Seconds of each part, one entry a round; the slowest rank's.
    """

    name: str
    dispatcher: Any
    selected: Tensor
    vectors: int = 0
    metadata: int = 0

    def __post_init__(self) -> None:
        """No times yet."""
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

        (batch, weights), times["dispatch"] = timed(dispatch)
        outputs = batch.detach().requires_grad_()
        combined, times["combine"] = timed(combine)
        self.vectors, self.metadata = sent.vectors, sent.metadata
        (grad,), times["combine backward"] = timed(
            lambda: torch.autograd.grad(combined, outputs, torch.ones_like(combined))
        )
        _, times["dispatch backward"] = timed(
            lambda: torch.autograd.grad(
                (batch, weights), (hidden, gates), (grad, torch.ones_like(weights))
            )
        )
        return times

    def vectors_wanted(self) -> int:
        """Vectors that the selections ask to leave this rank, by the dispatcher's rule."""
        ranks, rank = dist.get_world_size(), dist.get_rank()
        by_rank = self.selected.view(len(self.selected), ranks, -1)
        count = by_rank.any(dim=2).long() if self.name == "dedup" else by_rank.sum(dim=2)
        table = count.new_empty(ranks * ranks)
        dist.all_gather_into_tensor(table, count.sum(dim=0))
        table = table.view(ranks, ranks).fill_diagonal_(0)
        return int(table[rank].sum() + table[:, rank].sum())


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What the work returns, and its seconds on the slowest rank."""
    dist.barrier()
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - started, device=DEVICE)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return result, seconds.item()


def contestants(arguments: argparse.Namespace) -> list[Contestant]:
    """The three dispatchers on one expert-parallel group of all ranks."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from moepp_megatron.config import Layout, parse_config
    from moepp_megatron.model.megatron_config import transformer_config
    from moepp_megatron.moe.dispatcher import build_dispatcher
    from moepp_megatron.runtime.distributed import build_groups

    ranks = dist.get_world_size()
    config = parse_config(
        {
            "run": {"dir": "unused"},
            "model": {
                "num_layers": 1,
                "hidden_size": arguments.hidden_size,
                "ffn_hidden_size": arguments.hidden_size,
                "num_attention_heads": arguments.hidden_size // 64,
                "seq_length": arguments.tokens,
                "vocab_size": 64,
            },
            "moe": {"num_ffn_experts": arguments.experts, "router_topk": arguments.topk},
            "parallel": {"expert_model_parallel_size": ranks},
            "precision": {"dtype": arguments.dtype},
            "optimizer": {"lr": 1e-3},
            "training": {"train_iters": 1, "global_batch_size": ranks, "micro_batch_size": 1},
        }
    )
    build_groups(config, Layout.from_config(config, ranks))
    local = arguments.experts // ranks
    indices = [dist.get_rank() * local + index for index in range(local)]
    megatron, groups = transformer_config(config), ProcessGroupCollection.use_mpu_process_groups()
    every, some = (draw_selections(arguments, phi) for phi in (1.0, arguments.phi))
    vanilla = MoEAlltoAllTokenDispatcher(local, indices, megatron, groups)
    plain, dedup = (
        build_dispatcher(local, indices, megatron, groups, deduplicate=deduplicate)
        for deduplicate in (False, True)
    )
    return [
        Contestant("vanilla", vanilla, every),
        Contestant("plain", plain, some),
        Contestant("dedup", dedup, some),
    ]


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One record a dispatcher; bytes and vectors are rank 0's, of one forward pass."""
    shape = (arguments.tokens, 1, arguments.hidden_size)
    hidden = torch.randn(shape, dtype=DTYPES[arguments.dtype], device=DEVICE)
    sent = SentBytes(arguments.hidden_size)
    rivals = contestants(arguments)
    for index in range(arguments.warmup + arguments.rounds):
        first = index % len(rivals)
        for rival in rivals[first:] + rivals[:first]:
            times = rival.round(hidden, sent)
            if index >= arguments.warmup:
                for part, seconds in times.items():
                    rival.times[part].append(seconds)
    row = arguments.hidden_size * hidden.element_size()
    records = []
    for rival in rivals:
        wanted = rival.vectors_wanted() * row
        assert rival.vectors == wanted, f"{rival.name} sent {rival.vectors} bytes, not {wanted}"
        medians = {part: statistics.median(rival.times[part]) * 1e3 for part in PARTS}
        rounds, of_vanilla = (
            [sum(parts) for parts in zip(*r.times.values(), strict=True)]
            for r in (rival, rivals[0])
        )
        ratios = [mine / theirs for mine, theirs in zip(rounds, of_vanilla, strict=True)]
        records.append(
            {
                "dispatcher": rival.name,
                "ep": dist.get_world_size(),
                "vector_bytes": rival.vectors,
                "metadata_bytes": rival.metadata,
                "milliseconds": medians | {"all": statistics.median(rounds) * 1e3},
                "time_of_vanilla": statistics.median(ratios),
            }
        )
    return records


def table(arguments: argparse.Namespace, records: list[dict[str, Any]]) -> str:
    """The records as Markdown, with the formula of the plain dispatcher beside."""
    ranks = dist.get_world_size()
    width = DTYPES[arguments.dtype].itemsize
    whole = 2 * arguments.tokens * arguments.topk * arguments.hidden_size * width * (1 - 1 / ranks)
    lines = [
        f"EP {ranks}, {arguments.tokens} tokens a rank, hidden {arguments.hidden_size}, "
        f"{arguments.experts} FFN experts, top-{arguments.topk}, phi {arguments.phi}, "
        f"{arguments.dtype}. Bytes of one forward pass on rank 0; milliseconds and their ratio, "
        f"medians of {arguments.rounds} interleaved rounds.",
        f"2 T K D w (1 - 1/ep) = {whole:,.0f}; times phi {whole * arguments.phi:,.0f}",
        "",
        "| dispatcher | vector bytes | of vanilla | metadata bytes | "
        + " | ".join([*PARTS, "all", "of vanilla"])
        + " |",
        "|---" * (6 + len(PARTS)) + "|",
    ]
    for record in records:
        share = record["vector_bytes"] / records[0]["vector_bytes"]
        times = " | ".join(f"{value:.2f}" for value in record["milliseconds"].values())
        lines.append(
            f"| {record['dispatcher']} | {record['vector_bytes']:,} | {share:.3f} "
            f"| {record['metadata_bytes']:,} | {times} | {record['time_of_vanilla']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of each rank")
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--experts", type=int, default=8, help="FFN experts of all ranks")
    parser.add_argument("--topk", type=int, default=2)
    parser.add_argument("--phi", type=float, default=0.6, help="FFN share of the selections")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="file for the records")
    arguments = parser.parse_args()
    from moepp_megatron.runtime import distributed
    from moepp_megatron.runtime.quiet import quiet
    from moepp_megatron.runtime.rank import RankEnvironment

    quiet()
    distributed.start(RankEnvironment.read())
    records = measure(arguments)
    if dist.get_rank() == 0:
        print(table(arguments, records))
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(records, indent=2))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
