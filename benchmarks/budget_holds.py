"""Does `moe.budget` hold? Small models on real text that chose no default.

    python -m benchmarks.budget_holds OUT [--only TEXT] [--list] [--table]

Three layers 32 wide, 3,072 tokens a step, 240 steps, bytes as tokens, one process; about 20 seconds
a run on one core. Each run leaves `OUT/<name>.json`, which is not made again. `--only` takes the
runs whose names contain TEXT, `--table` prints what is there (docs/budget.md sums it up).

`moe.budget.response` and the correction for drift were chosen on other texts and seeds than those
of all runs here but `before` (docs/budget.md).
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.budget_table import BEFORE, STEPS, Run, tables
from benchmarks.texts import Sequences, text_of
from moepp_megatron.config import Config, Layout, parse_config
from moepp_megatron.runtime import cpu_support, distributed
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.runtime.rank import RankEnvironment

LAYERS, LENGTH = 3, 32
# Steps of an upcycled model with the controller, after those without it.
AFTER = 140
# Files of Python, its headers and packages, where `benchmarks.texts` has no such text.
_FILES = {
    "headers": ("include", "**/*.h"),
    "metadata": ("purelib", "*.dist-info/METADATA"),
    "stubs": ("purelib", "**/*.pyi"),
    "tests": ("stdlib", "test/*.py"),
}


def runs() -> Iterator[Run]:
    """All runs."""
    for label, budget in _OLD.items():
        yield Run("before", "prose", 1, label, _budget(0.3, **budget))
    for place, (corpus, seed) in enumerate((("headers", 11), ("metadata", 12), ("tests", 13))):
        for target in (0.3, 0.6, 1.0, 1.5):
            yield Run("proved", corpus, seed, f"{target:g}", _budget(target))
        # Two texts for each of the other layers and batches.
        for other, (label, moe) in enumerate(_OTHER_LAYERS.items()):
            if other % 3 != place:
                yield Run("proved", corpus, seed, label, moe)
    for batch in (24, 384):
        label = f"0.6, {batch * LENGTH} tokens a step"
        yield Run("proved", "metadata", 12, label, _budget(0.6), batch=batch)
    for corpus, seed in (("headers", 21), ("metadata", 22), ("tests", 23)):
        for tau in (0.05, 0.4):
            fixed = Run("loss", corpus, seed, f"tau {tau:g}", {"tau": tau})
            yield fixed
            for label, last in (("last third of", STEPS // 3), ("all of", STEPS)):
                name = f"{label} tau {tau:g}"
                yield Run("loss", corpus, seed, name, same_share_as=fixed.name, over_last=last)
    for corpus, seed in (("headers", 32), ("metadata", 33)):
        moe = {"gate_normalization": "selected", "gating_residual": False}
        for label, budget in _UPCYCLED.items():
            yield Run("upcycled", corpus, seed, label, {**moe, "budget": budget})


def _budget(target: float, **budget: Any) -> dict[str, Any]:
    return {"budget": {"target_ffn_per_token": target, **budget}}


# Rules with a fixed gain, at their own defaults and at the best that was known.
_OLD: dict[str, dict[str, Any]] = {
    "fixed tau": {"controller": "none"},
    "tau": {"controller": "tau"},
    "gain 0.01": {"controller": "bias", "gain": 0.01},
    "gain 0.2 no average": {"controller": "bias", "gain": 0.2, "decay": 0.0},
}
_WIDE: dict[str, Any] = {"num_ffn_experts": 32, "num_constant_experts": 6}
_OTHER_LAYERS: dict[str, dict[str, Any]] = {
    "0.3 of 1, 4 experts": {"num_ffn_experts": 4, "router_topk": 1, **_budget(0.3)},
    "0.6, 32 experts": _WIDE | _budget(0.6),
    "1.5 of 4, 32 experts": _WIDE | {"router_topk": 4, **_budget(1.5)},
    "0.6, sigmoid": {"score_function": "sigmoid", "gate_normalization": "selected", **_budget(0.6)},
}
_UPCYCLED: dict[str, dict[str, Any]] = {
    "default": {"controller": "bias"},
    "gain 0.1": {"controller": "bias", "gain": 0.1},
    "gain 1": {"controller": "bias", "gain": 1.0},
}


class Text(Sequences):
    """From anywhere in a text of this machine, by index and seed."""

    def __init__(self, corpus: str, length: int, seed: int) -> None:
        self._length, self._seed = length, seed
        if corpus in _FILES:
            folder, pattern = _FILES[corpus]
            files = sorted(Path(sysconfig.get_path(folder)).glob(pattern))
            content = b"\n".join(path.read_bytes() for path in files)[: 1 << 24]
            self._text = np.frombuffer(content, np.uint8)
        else:
            self._text = text_of(corpus)


def configuration(run: Run, out: Path) -> Config:
    """The configuration of a run."""
    moe: dict[str, Any] = {"num_ffn_experts": 8, "balance_coeff": 0.05, **run.moe}
    if run.same_share_as is not None:
        other = json.loads((out / f"{run.same_share_as}.json").read_text())
        moe |= _budget(float(np.mean(other["layers"][-run.over_last :])))
    return parse_config(
        {
            "run": {"dir": "unused"},
            "model": {
                "num_layers": LAYERS,
                "hidden_size": 32,
                "ffn_hidden_size": 48,
                "num_attention_heads": 2,
                "seq_length": LENGTH,
                "vocab_size": 256,
                "init_method_std": 0.05,
            },
            "moe": moe,
            "optimizer": {"lr": 4e-3, "min_lr": 4e-4, "warmup_iters": 15},
            "training": {
                "train_iters": STEPS,
                "global_batch_size": run.batch,
                "micro_batch_size": run.batch,
                "seed": run.seed,
            },
        }
    )


def measure(run: Run, out: Path) -> dict[str, Any]:
    """Loss, FFN experts per token of each layer, and the busiest expert's load, of each step."""
    from benchmarks.fresh_ranks import forget_model
    from moepp_megatron.features.budget.part import BudgetPart
    from moepp_megatron.runtime.distributed import build_groups
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.parts.routing_counts import RoutingCountsPart
    from moepp_megatron.training.setup import build_training_model
    from moepp_megatron.training.step import training_step
    from moepp_megatron.training.step_sums import mean_loss

    config = configuration(run, out)
    layout = Layout.from_config(config, 1)
    build_groups(config, layout)
    model = build_training_model(config)
    model.set_training(True)
    routing = RoutingCountsPart(model, config, layout)
    budget = BudgetPart(config, model, routing) if config.moe.budget.acts else None
    (batches,) = rank_batches(Text(run.corpus, LENGTH, run.seed), 0, config, 1)
    record: dict[str, Any] = {"target": config.moe.ffn_share * config.moe.router_topk}
    record |= {"loss": [], "layers": [], "load": []}
    late = run.part == "upcycled"
    if late:
        _block(model)
    for step in range(1, (BEFORE + AFTER if late else STEPS) + 1):
        if late and step == BEFORE + 1:
            _upcycle(model, config)
        acting = budget if not late or step > BEFORE else None
        routing.reset()
        if acting is not None:
            acting.begin_step(step, layout)
        result = training_step(model, [batches], config, layout)
        if acting is not None:
            acting.learn(step)
        shares = routing.collect()
        record["loss"].append(mean_loss(result.losses))
        record["layers"].append([s * config.moe.router_topk for s in shares["layer_ffn_fraction"]])
        record["load"].append(shares["max_ffn_load"])
    forget_model()
    return record


def _block(model: Any) -> None:
    """Keep every token from zero-computation experts."""
    from moepp_megatron.moe.layer import moepp_layers

    for layer in moepp_layers(model.models[0]):
        layer.router.expert_bias[: layer.router.moepp.num_ffn_experts] = 4.0


@torch.no_grad()
def _upcycle(model: Any, config: Config) -> None:
    """Give zero-computation experts the router rows and the bias of an upcycled model."""
    from moepp_megatron.interop.upcycle import _new_rows, _selection_bias
    from moepp_megatron.model.initialize import seeded_noise
    from moepp_megatron.moe.layer import moepp_layers

    ffn = config.moe.num_ffn_experts
    norms = [layer.pre_mlp_layernorm.weight for layer in model.models[0].decoder.layers]
    for norm, layer in zip(norms, moepp_layers(model.models[0]), strict=True):
        rows = layer.router.weight
        added = seeded_noise(config.training.seed, str(layer.layer_number), tuple(rows[ffn:].shape))
        rows[ffn:] = _new_rows(rows[:ffn], norm, added)
        layer.router.expert_bias.copy_(_selection_bias(rows, norm, ffn))
    model.optimizer.reload_model_params()


def main() -> None:
    """Measure what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--only", default="", help="runs whose names contain this")
    parser.add_argument("--list", action="store_true", help="print names, run nothing")
    parser.add_argument("--table", action="store_true", help="print the tables, run nothing")
    arguments = parser.parse_args()
    chosen = [run for run in runs() if arguments.only in run.name]
    if arguments.table:
        print(tables(chosen, arguments.out))
        return
    missing = [run for run in chosen if not (arguments.out / f"{run.name}.json").exists()]
    if arguments.list:
        print("\n".join(run.name for run in missing))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    cpu_support.install()
    distributed.start(RankEnvironment())
    for run in missing:
        record = measure(run, arguments.out)
        write_atomic(arguments.out / f"{run.name}.json", json.dumps(record).encode())
        print(f"{run.name}: loss {record['loss'][-1]:.3f}", flush=True)
    distributed.stop()


if __name__ == "__main__":
    main()
