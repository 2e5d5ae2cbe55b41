"""One run of the ladder: what decides it, its configuration, its training and its result.

The configuration depends on nothing but the run, so a result is known by the run's name.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.fault_corpora import VOCAB_SIZE, Corpora, Mixed
from moepp_megatron.config import Config, Layout, parse_config
from moepp_megatron.config.flops import training_flops_per_token
from moepp_megatron.config.vanilla import vanilla
from moepp_megatron.runtime import distributed

LENGTH, BATCH, TEXT = 128, 32, 6_000_000
K = 2
VALIDATION_BATCHES = 3
KINDS = {
    "A": {"code": ("python", "c"), "prose": ("manual", "rst"), "languages": ("french", "german")},
    "B": {
        "code": ("cpp", "perl"),
        "prose": ("prose", "markdown"),
        "languages": ("russian", "swedish"),
    },
}


@dataclass(frozen=True)
class Size:
    """A rung: the model's shape by its settings, and the steps of vanilla's run."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    steps: int


SIZES = {
    "XS": Size(2, 32, 88, 2, 110),
    "S": Size(3, 48, 128, 3, 160),
    "M": Size(4, 64, 176, 4, 240),
    "L": Size(4, 96, 256, 6, 340),
    "XL": Size(6, 144, 384, 6, 560),
}

# What an arm changes in section `moe` of the paper's layer; balance as in the quickstart.
_PAPER: dict[str, Any] = {"num_ffn_experts": 8, "tau": 0.75, "balance_coeff": 0.05}
_IDENTITY = {
    "num_zero_experts": 0,
    "num_copy_experts": 4,
    "num_constant_experts": 0,
    "gating_residual": False,
    "budget": {"target_ffn_per_token": 0.65 * K},
}
ARMS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "vanilla selected": {"gate_normalization": "selected"},
    "paper": {},
    "selected": {"gate_normalization": "selected"},
    "no residual": {"gating_residual": False},
    "identity": _IDENTITY,
}
# Changes of the paper's arm whose worth stage `decide` measures on the two smallest sizes, at that
# arm's rate and weights.
DECIDING = ("XS", "S")
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "nothing": {},
    "selected": {"moe": {"gate_normalization": "selected"}},
    "no residual": {"moe": {"gating_residual": False}},
    "balance 0.01": {"moe": {"balance_coeff": 0.01}},
    "balance 0.2": {"moe": {"balance_coeff": 0.2}},
    "budget": {"moe": {"budget": {"target_ffn_per_token": 0.65 * K}}},
    "init 0.02": {"model": {"init_method_std": 0.02}},
    "init twice": {},
    # Around the package's initial weights: each less `init 0.02`.
    "init 0.02, selected": {
        "model": {"init_method_std": 0.02},
        "moe": {"gate_normalization": "selected"},
    },
    "init 0.02, no residual": {
        "model": {"init_method_std": 0.02},
        "moe": {"gating_residual": False},
    },
    "init 0.02, balance 0.01": {
        "model": {"init_method_std": 0.02},
        "moe": {"balance_coeff": 0.01},
    },
}


@dataclass(frozen=True)
class Run:
    """A run by what decides its result.

    Attributes:
        stage: The stage.
        arm: A name of `ARMS`.
        size: A name of `SIZES`.
        seed: Of the initial weights and of the order of the data.
        steps: Steps; the schedule ends with them.
        rate: Learning rate on size S.
        std: Initial standard deviation on size S.
        mixture: A name of `KINDS`.
        what: Which run of the arm it is: `steps`, `flop`, or a name of `CHANGES`.
    """

    stage: str
    arm: str
    size: str
    seed: int
    steps: int
    rate: float
    std: float
    mixture: str = "A"
    what: str = "steps"

    @property
    def name(self) -> str:
        """What identifies it among the results."""
        parts = (self.stage, self.arm, self.size, self.what, self.seed)
        tuning = (self.rate, self.std) if self.stage == "tune" else ()
        return " ".join(f"{part}" for part in (*parts, *tuning))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The corpora that are trained on."""
        return sum(KINDS[self.mixture].values(), ())


def flop_per_token(arm: str, size: str, share: float) -> float:
    """FLOP of training an arm on a token, at an FFN share."""
    return training_flops_per_token(config_of(Run("", arm, size, 0, 1, 1e-3, 0.05), Path()), share)


def steps_for_flop(arm: str, size: str, share: float) -> int:
    """Steps of an arm that come to the FLOP of vanilla's run, at a measured FFN share."""
    saved = flop_per_token("vanilla", size, 1.0) / flop_per_token(arm, size, share)
    return round(SIZES[size].steps * saved)


def config_of(run: Run, folder: Path) -> Config:
    """The configuration of a run, of which files would go to `folder`."""
    shape = asdict(SIZES[run.size])
    del shape["steps"]
    narrow = SIZES["S"].hidden_size / shape["hidden_size"]
    rate, std = run.rate * narrow, run.std * narrow**0.5
    content: dict[str, Any] = {
        "run": {"dir": str(folder)},
        "data": {"path": str(folder), "tokenizer": str(folder / "tokenizer.json")},
        "model": {**shape, "seq_length": LENGTH, "vocab_size": VOCAB_SIZE, "init_method_std": std},
        "moe": {**_PAPER, **ARMS[run.arm]},
        "optimizer": {"lr": rate, "min_lr": rate / 10, "warmup_iters": run.steps // 10},
        "training": {
            "train_iters": run.steps,
            "global_batch_size": BATCH,
            "micro_batch_size": BATCH,
            "seed": run.seed + 1,
            "eval_iters": VALIDATION_BATCHES,
        },
        "routing_guard": "off",
        "resilience": {"guard": False},
    }
    if run.what == "init twice":
        content["model"]["init_method_std"] = 2 * std
    for section, changed in CHANGES.get(run.what, {}).items():
        content[section] |= changed
    config = parse_config(content)
    return vanilla(config) if run.arm.startswith("vanilla") else config


@dataclass
class Part(Corpora):
    """The part of the corpora that is trained on, or the tenth that is held out."""

    held_out: bool = False

    def tokens(self, kind: str) -> NDArray[np.int64]:
        """[tokens] int64."""
        tokens = super().tokens(kind)
        cut = len(tokens) * 9 // 10
        return tokens[cut:] if self.held_out else tokens[:cut]


def sequences(out: Path, kinds: tuple[str, ...], seed: int, held_out: bool) -> Mixed:
    """Sequences from anywhere in the corpora, each as often as another."""
    mixture = {kind: 1 / len(kinds) for kind in kinds}
    return Mixed(Part(out / "corpora", TEXT, held_out), [(1, mixture)], BATCH, LENGTH, seed)


def train(run: Run, out: Path) -> tuple[Any, Config, Layout, list[float], list[float]]:
    """The trained model, its configuration and layout, loss and FFN share of every step."""
    from benchmarks.fresh_ranks import forget_model
    from moepp_megatron.features.budget.part import BudgetPart
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.part import Parts
    from moepp_megatron.training.parts.routing_counts import RoutingCountsPart
    from moepp_megatron.training.setup import build_training_model
    from moepp_megatron.training.step import training_step
    from moepp_megatron.training.step_sums import mean_loss

    config = config_of(run, out)
    layout = Layout.from_config(config, 1)
    forget_model()
    distributed.build_groups(config, layout)
    model = build_training_model(config)
    routing = None if run.arm.startswith("vanilla") else RoutingCountsPart(model, config, layout)
    budget = None
    if routing is not None and config.moe.budget.acts:
        budget = BudgetPart(config, model, routing)
    parts = Parts([part for part in (routing, budget) if part is not None])
    (batches,) = rank_batches(sequences(out, run.kinds, run.seed, False), 0, config, 1)
    model.set_training(True)
    losses, shares = [], []
    for step in range(1, run.steps + 1):
        parts.begin_step(step, layout)
        losses.append(mean_loss(training_step(model, [batches], config, layout, parts).losses))
        if budget is not None:
            budget.learn(step)
        shares.append(1.0 if routing is None else float(routing.collect()["ffn_fraction"]))  # type: ignore[arg-type]
    return model, config, layout, losses, shares


def measure(run: Run, out: Path) -> dict[str, Any]:
    """Train and validate: loss of each corpus, FFN share, FLOP."""
    from moepp_megatron.features.validation.part import validation_loss

    started = time.process_time()
    model, config, layout, losses, shares = train(run, out)
    valid = {
        kind: round(validation_loss(model, sequences(out, (kind,), 7, True), config, layout), 5)
        for kind in run.kinds
    }
    per_token = training_flops_per_token(config, float(np.mean(shares)))
    return {
        "run": asdict(run),
        "valid": valid,
        "loss": round(float(np.mean(losses[-20:])), 5),
        "share": round(float(np.mean(shares)), 5),
        "share at the end": round(float(np.mean(shares[-20:])), 5),
        "flop": per_token * run.steps * BATCH * LENGTH,
        "cpu_s": round(time.process_time() - started, 1),
    }


def machine() -> str:
    """This machine, and the versions that decide a result."""
    packages = (f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    return ", ".join((f"{os.cpu_count()} {platform.machine()} cores", *packages))
