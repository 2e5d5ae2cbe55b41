"""How should an upcycled model be trained on? Tiny models that have something to lose.

    python -m benchmarks.upcycle_recipe OUT [--only TEXT | --exact NAME] [--list] [--table]

A Mixtral or a Qwen3-MoE of 3 layers, 48 wide, 8 experts, top-2, is trained from nothing with
transformers (steps of 3,072 bytes: 400, or 160 of Qwen3-MoE), upcycled by `moepp convert upcycle`'s
function, and trained on for 200 steps. A run takes about a minute on one core, a Mixtral's source
two, a Qwen3-MoE's three or more. Sources lie in `OUT/sources`; each run leaves `OUT/<name>.json`,
which is not made again. `--table` prints what is there (docs/how_to/upcycle.md sums it up).

`chose` runs are those that the settings in configs/upcycle/ were chosen by; the text, the seeds and
the architecture of `proved` runs were not looked at before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.texts import Sequences, text_of
from benchmarks.upcycle_table import AFTER, Run, table
from moepp_megatron.config import Config, Layout, load_config
from moepp_megatron.runtime import cpu_support, distributed
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.runtime.quiet import quiet
from moepp_megatron.runtime.rank import RankEnvironment

# Steps of a source; Qwen3-MoE's take three times as long here.
BEFORE = {"mixtral": 400, "qwen3": 160}
LENGTH, BATCH = 64, 48
# Bytes at the end of a text that no run is trained on.
HELD_OUT = 1 << 18
VALIDATION = 64
# Steps after which the validation loss is measured.
LOOKS = (0, 5, 10, 20, 40, 70, 100, 150, AFTER)


def runs() -> Iterator[Run]:
    """All runs."""
    for label, settings in _CANDIDATES.items():
        yield Run("chose", "mixtral", "code", 1, label, settings)
    for family, text, seed in (
        ("qwen3", "code", 1),
        ("mixtral", "prose", 2),
        ("qwen3", "prose", 3),
    ):
        for label in _PROVED:
            yield Run("proved", family, text, seed, label, _CANDIDATES[label])


_LR = 1e-3
_RAMP = {"moe.budget.start_ffn_per_token": 2.0, "moe.budget.target_ffn_per_token": 1.2}
_CANDIDATES: dict[str, dict[str, Any]] = {
    "no new experts": {"added": 0},
    "bias": {},
    "bias, ramp 50": {**_RAMP, "moe.budget.ramp_steps": 50},
    "bias, ramp 100": {**_RAMP, "moe.budget.ramp_steps": 100},
    "bias, ramp 150": {**_RAMP, "moe.budget.ramp_steps": 150},
    "gain 0.1": {"moe.budget.gain": 0.1},
    "gain 0.3": {"moe.budget.gain": 0.3},
    "tau": {"moe.budget.controller": "tau"},
    "none": {"moe.budget.controller": "none"},
    "bias, rate 3e-3": {"optimizer.lr": 3e-3},
    "no new experts, rate 3e-3": {"added": 0, "optimizer.lr": 3e-3},
    "bias, taught": {"distillation.weight": 1.0},
    "bias, ramp 50, taught": {**_RAMP, "moe.budget.ramp_steps": 50, "distillation.weight": 1.0},
    "no new experts, taught": {"added": 0, "distillation.weight": 1.0},
    "bias, taught with 3": {"distillation.weight": 3.0},
    "bias, taught at temperature 2": {"distillation.weight": 1.0, "distillation.temperature": 2.0},
    "bias, taught 16 tokens": {"distillation.weight": 1.0, "distillation.top_k": 16},
}
_PROVED = ("no new experts", "bias", "bias, ramp 50", "bias, ramp 50, taught")


@cache
def _text(name: str) -> np.ndarray:
    return text_of(name)


class _Part(Sequences):
    """Sequences from the training part of a text, or from what is held out."""

    def __init__(self, text: str, seed: int, held_out: bool) -> None:
        whole = _text(text)
        size = min(HELD_OUT, len(whole) // 10)
        self._text = whole[-size:] if held_out else whole[:-size]
        self._length, self._seed = LENGTH, seed


def source(run: Run, out: Path) -> Path:
    """The folder of the run's source model, trained if it is not there."""
    folder = out / "sources" / f"{run.family}-{run.text}-{run.seed}"
    if (folder / "losses.json").exists():
        return folder
    import transformers

    shape = {
        "vocab_size": 256,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
        "num_experts_per_tok": 2,
        "initializer_range": 0.05,
        "router_aux_loss_coef": 0.02,
        "output_router_logits": True,
        "use_cache": False,
    }
    torch.manual_seed(run.seed)
    if run.family == "mixtral":
        config = transformers.MixtralConfig(**shape, num_local_experts=8, intermediate_size=64)
        model = transformers.MixtralForCausalLM(config)
    else:
        own = {"num_experts": 8, "moe_intermediate_size": 64, "norm_topk_prob": True}
        config = transformers.Qwen3MoeConfig(**shape, **own, intermediate_size=64, head_dim=16)
        model = transformers.Qwen3MoeForCausalLM(config)
    text = _Part(run.text, run.seed, held_out=False)
    losses = _train_source(model, text, BEFORE[run.family])
    model.save_pretrained(folder)
    write_atomic(folder / "losses.json", json.dumps(losses).encode())
    return folder


def _train_source(model: Any, text: _Part, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warmup) * (0.6 + 0.4 * np.cos(np.pi * step / steps)),
    )
    losses = []
    for step in range(steps):
        rows = [text[step * BATCH + row] for row in range(BATCH)]
        tokens = torch.stack([row["tokens"] for row in rows])
        labels = torch.stack([row["labels"] for row in rows])
        output = model(input_ids=tokens, labels=labels, shift_labels=labels)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(output.loss.detach()))
    return losses


def upcycled(run: Run, out: Path) -> tuple[Path, Config]:
    """The checkpoint that the run begins with, and the run's configuration."""
    from moepp_megatron.interop.upcycle import Additions, upcycle

    folder = source(run, out)

    def converted(added: int, residual: bool) -> Path:
        target = out / "upcycled" / f"{folder.name}-{added}-{residual}"
        if not target.exists():
            counts = {"num_zero_experts": added, "num_copy_experts": added}
            counts["num_constant_experts"] = 2 * added
            upcycle(folder, target, Additions(**counts, gating_residual=residual))
        return target

    target = converted(run.settings.get("added", 1), run.settings.get("residual", True))
    teacher = {}
    if any(key.startswith("distillation.") for key in run.settings):
        teacher["distillation.teacher"] = converted(0, True)
    settings = {
        "run.dir": "unused",
        "model.seq_length": LENGTH,
        "training.train_iters": AFTER,
        "training.global_batch_size": BATCH,
        "training.micro_batch_size": BATCH,
        "training.seed": run.seed,
        "optimizer.lr": _LR,
        "optimizer.min_lr": 1e-4,
        "optimizer.warmup_iters": 10,
        "moe.balance_coeff": 0.02,
        **{key: value for key, value in run.settings.items() if "." in key},
    }
    overrides = [f"{key}={value}" for key, value in {**settings, **teacher}.items()]
    return target, load_config(target / "config.yaml", overrides)


def measure(run: Run, out: Path) -> dict[str, Any]:
    """Training loss and FFN share of each step, validation losses at `LOOKS`."""
    from benchmarks.fresh_ranks import forget_model
    from moepp_megatron.runtime.distributed import build_groups
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.checkpoint import read_checkpoint
    from moepp_megatron.training.collect import mean_loss
    from moepp_megatron.training.part import Parts
    from moepp_megatron.training.parts.budget import BudgetControl
    from moepp_megatron.training.parts.distillation import Distillation
    from moepp_megatron.training.parts.routing_counts import RoutingCounts
    from moepp_megatron.training.setup import build_training_model
    from moepp_megatron.training.step import training_step
    from moepp_megatron.training.teacher import TeacherModel

    checkpoint, config = upcycled(run, out)
    layout = Layout.from_config(config, 1)
    build_groups(config, layout)
    model = build_training_model(config)
    teacher = TeacherModel.of(config)
    distillation = None if teacher is None else Distillation(config, teacher)
    read_checkpoint(checkpoint, model, config, weights_only=True)
    routing = RoutingCounts(model, config, layout)
    budget = BudgetControl(config, model, routing, None) if config.moe.budget.acts else None
    parts = Parts([part for part in (routing, budget, distillation) if part is not None])
    # Other places of the text than the source was trained on.
    (batches,) = rank_batches(_Part(run.text, run.seed + 1000, held_out=False), 0, config, 1)
    record: dict[str, Any] = {"phi": config.moe.ffn_share, "loss": [], "share": [], "layers": []}
    record["valid"] = {0: _validation(model, run, config, layout)}
    for step in range(1, AFTER + 1):
        parts.begin_step(step, layout)
        result = training_step(model, [batches], config, layout, parts)
        if budget is not None:
            budget.learn(step)
        shares = routing.collect()
        record["loss"].append(mean_loss(result.losses))
        record["share"].append(shares["ffn_fraction"])
        record["layers"].append(shares["layer_ffn_fraction"])
        if step in LOOKS:
            record["valid"][step] = _validation(model, run, config, layout)
    forget_model()
    return record


def _validation(model: Any, run: Run, config: Config, layout: Layout) -> float:
    from moepp_megatron.config import with_overrides
    from moepp_megatron.training.parts.validation import validation_loss

    iters = -(-4 * VALIDATION // BATCH)
    config = with_overrides(config, [f"training.eval_iters={iters}"])
    loss = validation_loss(model, _Part(run.text, 7, held_out=True), config, layout)
    model.set_training(True)
    return loss


def main() -> None:
    """Measure what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--only", default="", help="runs whose names contain this")
    parser.add_argument("--exact", help="the run of this name")
    parser.add_argument("--list", action="store_true", help="print names, run nothing")
    parser.add_argument("--table", action="store_true", help="print the tables, run nothing")
    arguments = parser.parse_args()
    chosen = [run for run in runs() if arguments.only in run.name]
    if arguments.exact is not None:
        chosen = [run for run in chosen if run.name == arguments.exact]
    if arguments.table:
        print(table(chosen, arguments.out))
        return
    missing = [run for run in chosen if not (arguments.out / f"{run.name}.json").exists()]
    if arguments.list:
        print("\n".join(run.name for run in missing))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    quiet()
    cpu_support.install()
    distributed.start(RankEnvironment())
    for run in missing:
        record = measure(run, arguments.out)
        write_atomic(arguments.out / f"{run.name}.json", json.dumps(record).encode())
        last = float(np.mean(record["share"][-20:]))
        print(f"{run.name}: validation {record['valid'][AFTER]:.4f}, share {last:.3f}", flush=True)
    distributed.stop()


if __name__ == "__main__":
    main()
