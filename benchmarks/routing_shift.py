"""How often the shift monitor errs: a small model on real text, many windows, three kinds of text.

Run in one process, minutes to tens of minutes:

    python benchmarks/routing_shift.py --steps 600 --windows 1000

Trains on the prose of Python's language reference, watched, then reads more of it with the model as
it is, watched anew, then the standard library's sources, prose again, random bytes. Bytes are the
tokens. A sequence begins anywhere in its text.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moepp_megatron.config import Layout, parse_config
from moepp_megatron.runtime import cpu_support, distributed
from moepp_megatron.runtime.rank import RankEnvironment


def text_of(kind: str) -> np.ndarray:
    """[bytes] uint8."""
    if kind == "prose":
        from pydoc_data.topics import topics

        return np.frombuffer("\n".join(topics[key] for key in sorted(topics)).encode(), np.uint8)
    if kind == "code":
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        return np.frombuffer(b"\n".join(path.read_bytes() for path in sources), np.uint8)
    return np.random.default_rng(0).integers(256, size=1 << 20).astype(np.uint8)


class Sequences:
    """From anywhere in a text, by index and seed."""

    def __init__(self, kind: str, length: int, seed: int) -> None:
        self._text, self._length, self._seed = text_of(kind), length, seed

    def __len__(self) -> int:
        """More than any run reads."""
        return 100_000_000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Depends on the index alone."""
        chance = np.random.default_rng([self._seed, index])
        start = int(chance.integers(len(self._text) - self._length))
        tokens = torch.from_numpy(self._text[start : start + self._length + 1].astype(np.int64))
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(self._length),
            "position_ids": torch.arange(self._length),
        }


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Two layers of 8 + 4 experts, 32 wide."""
    batch = arguments.batch
    return {
        "run": {"dir": "unused"},
        "model": {
            "num_layers": arguments.layers,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 2,
            "seq_length": arguments.length,
            "vocab_size": 256,
            "init_method_std": 0.05,
        },
        "moe": {"num_ffn_experts": 8, "balance_coeff": 0.05},
        "optimizer": {"lr": 4e-3, "min_lr": 4e-4, "warmup_iters": 15},
        "training": {
            "train_iters": arguments.steps,
            "global_batch_size": batch,
            "micro_batch_size": batch,
            "seed": arguments.seed,
        },
        "routing_guard": {"enabled": True, "shift": {"window": arguments.window}},
    }


def told(name: str, values: list[float | None], started: float) -> None:
    """Print what was told of some windows."""
    judged = np.array([value for value in values if value is not None])
    first = " ".join(f"{value:.2f}" for value in judged[:4])
    highest = " ".join(f"{value:.2f}" for value in np.sort(judged)[-4:])
    print(
        f"{name:22} {len(values)} windows, {len(judged)} judged, {(judged > 1).sum()} shifts; "
        f"median {np.median(judged) if len(judged) else np.nan:.3f}, highest {highest}; "
        f"first {first}; {time.perf_counter() - started:.0f} s",
        flush=True,
    )


def main() -> None:
    """Train, watch, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--windows", type=int, default=1000, help="of prose behind that")
    parser.add_argument("--window", type=int, default=4, help="steps of a window")
    parser.add_argument("--batch", type=int, default=192, help="sequences of a step")
    parser.add_argument("--length", type=int, default=32, help="tokens of a sequence")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    cpu_support.install()
    distributed.start(RankEnvironment())
    # After cpu_support: these import megatron-core.
    from moepp_megatron.runtime.distributed import build_groups
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.collect import RoutingCollector
    from moepp_megatron.training.routing_shift import RoutingShift
    from moepp_megatron.training.setup import build_training_model
    from moepp_megatron.training.step import training_step

    config = parse_config(settings(arguments))
    layout = Layout.from_config(config, 1)
    build_groups(config, layout)
    model = build_training_model(config)
    model.set_training(True)
    routing = RoutingCollector(model, config, layout)

    def batches(kind: str, seed: int) -> Any:
        (made,) = rank_batches(Sequences(kind, arguments.length, seed), 0, config, 1)
        return made

    prose = batches("prose", 1)
    dataset = [Sequences("prose", arguments.length, 1)[index] for index in range(4096)]
    shift, values, started = RoutingShift(config, model, routing, dataset), [], time.perf_counter()
    for step in range(1, arguments.steps + 1):
        routing.reset()
        result = training_step(model, [prose], config, layout)
        value = shift.end_step()
        if step % arguments.window == 0:
            values.append(value)
        if step in (1, arguments.steps):
            print(f"step {step}: loss {float(result.losses[0] / result.losses[1]):.3f}")
    told("prose, in training", values, started)
    shift = RoutingShift(config, model, routing, dataset)
    for seed, (kind, count) in enumerate(
        [("prose", arguments.windows), ("code", 4), ("prose", 20), ("bytes", 4), ("prose", 20)]
    ):
        texts, values, started = batches(kind, 100 + seed), [], time.perf_counter()
        for step in range(1, count * arguments.window + 1):
            routing.reset()
            batch = next(texts)
            model.chunks[0](batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
            value = shift.end_step()
            if step % arguments.window == 0:
                values.append(value)
        told(kind, values, started)
    distributed.stop()


if __name__ == "__main__":
    main()
