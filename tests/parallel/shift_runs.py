"""Real text of three kinds, and training on it watched for shifts of the data."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from tests.parallel.training_runs import settings

LENGTH, BATCH = 32, 192

WATCHED: dict[str, Any] = settings(
    model={
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_query_groups": 2,
        "seq_length": LENGTH,
        "vocab_size": 256,
        "init_method_std": 0.05,
    },
    moe={"num_ffn_experts": 8, "balance_coeff": 0.05},
    optimizer={"lr": 4.0e-3, "weight_decay": 0.1, "warmup_iters": 5},
    training={"train_iters": 1000, "global_batch_size": BATCH, "micro_batch_size": BATCH},
    routing_guard={"enabled": True, "shift": {"window": 4, "warmup": 8}},
)


def text_of(kind: str) -> np.ndarray:
    """[bytes] uint8: Python's language reference, its library's sources, or no text at all."""
    if kind == "prose":
        from pydoc_data.topics import topics

        return np.frombuffer("\n".join(topics[key] for key in sorted(topics)).encode(), np.uint8)
    if kind == "code":
        folder = Path(sysconfig.get_path("stdlib"))
        sources = sorted(folder.glob("*.py"))
        return np.frombuffer(b"\n".join(path.read_bytes() for path in sources), np.uint8)
    return np.random.default_rng(0).integers(256, size=1 << 20).astype(np.uint8)


class TextDataset:
    """Sequences from anywhere in a text; `kinds` says of which, for so many samples each."""

    def __init__(self, kinds: list[tuple[str, int]]) -> None:
        self._texts = {kind: text_of(kind) for kind, _ in kinds}
        self._kinds = [kind for kind, count in kinds for _ in range(count)]

    def __len__(self) -> int:
        return len(self._kinds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        text = self._texts[self._kinds[index]]
        start = int(np.random.default_rng(index).integers(len(text) - LENGTH))
        tokens = torch.from_numpy(text[start : start + LENGTH + 1].astype(np.int64))
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(LENGTH),
            "position_ids": torch.arange(LENGTH),
        }


def watch(steps: int, kinds: list[tuple[str, int]]) -> tuple[list[float], list[float | None]]:
    """Train on prose for some steps, then watch the model read so many windows of each kind.

    Returns:
        The loss of each step, and what is told of each window.
    """
    from moepp_megatron.training.collect import mean_loss
    from moepp_megatron.training.routing_shift import RoutingShift
    from moepp_megatron.training.step import training_step

    window = WATCHED["routing_guard"]["shift"]["window"]
    read = [(kind, count * window * BATCH) for kind, count in kinds]
    dataset = TextDataset([("prose", steps * BATCH), *read])
    config, layout, model, routing, (batches,) = begin(WATCHED, dataset)
    losses = []
    for _ in range(steps):
        losses.append(mean_loss(training_step(model, [batches], config, layout).losses))
    shift = RoutingShift(config, model, routing, dataset)
    values = []
    for step in range(1, window * sum(count for _, count in kinds) + 1):
        routing.reset()
        batch = next(batches)
        # A training step without its second half: forward passes are what is counted.
        model.chunks[0](batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        value = shift.end_step()
        if step % window == 0:
            values.append(value)
        else:
            assert value is None, "only whole windows are judged"
    return losses, values


def begin(raw: dict[str, Any], dataset: Any) -> tuple[Any, Any, Any, Any, Any]:
    """Configuration, layout, model in training, collector and batches on this rank."""
    import torch.distributed as dist

    from moepp_megatron.config import Layout, parse_config
    from moepp_megatron.runtime.distributed import build_groups
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.collect import RoutingCollector
    from moepp_megatron.training.setup import build_training_model

    config = parse_config(raw)
    layout = Layout.from_config(config, dist.get_world_size())
    build_groups(config, layout)
    model = build_training_model(config)
    model.set_training(True)
    routing = RoutingCollector(model, config, layout)
    return config, layout, model, routing, rank_batches(dataset, 0, config, len(model.chunks))
