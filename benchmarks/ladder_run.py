"""One run of the ladder: what decides it, its configuration, its training and its result.

The configuration depends on nothing but the run, so a result is known by the run's name.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.fault_corpora import VOCAB_SIZE, Corpora, Mixed
from moepp_megatron.config import Config, Layout, parse_config
from moepp_megatron.config.flops import training_flops_per_token
from moepp_megatron.config.vanilla import vanilla
from moepp_megatron.experts import ZERO
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
    "C": {
        "code": ("javascript", "cmake"),
        "prose": ("licences", "html"),
        "languages": ("spanish", "greek"),
    },
    # Half of the sequences are one line, repeated.
    "control": {"easy": ("line",), "hard": ("python", "manual", "french")},
}
# How often a sequence is of a corpus, where that is not once.
_OFTEN = {"line": 3}


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


@dataclass(frozen=True)
class EqualArm:
    """An arm whose tokens take as many FFN experts on average as vanilla's.

    Attributes:
        moe: What it changes in section `moe` of the paper's layer.
        against: The vanilla arm with its gates and experts.
        tuned_as: The arm whose learning rate and initial weights it has; empty for its own.
        null: For one logit of all zero experts: 1 where it is learned, 0 where it is 0.
    """

    moe: dict[str, Any]
    against: str
    tuned_as: str = ""
    null: float | None = None


_MIX, _ZERO, _COPY = (1, 1, 2), (4, 0, 0), (0, 4, 0)
_HELD = {"target_ffn_per_token": float(K)}
# Each FFN expert's bias moves by its own load, without any balance loss (LongCat-Flash's rule).
_BIAS_ALONE = {"balance_coeff": 0.0, "budget": {**_HELD, "gain": 0.1, "decay": 0.0}}


def _more(
    topk: int, experts: tuple[int, int, int], gates: str, tuned_as: str = "", **moe: Any
) -> EqualArm:
    """`topk` picks of 8 FFN and zero, copy and constant `experts`."""
    counts = {f"num_{kind}_experts": n for kind, n in zip(_ORDER, experts, strict=True)}
    own = {"router_topk": topk, "gate_normalization": gates, "gating_residual": False}
    against = "vanilla" if gates == "none" else "vanilla selected"
    return EqualArm({**own, **counts, "budget": _HELD, **moe}, against, tuned_as)


def _fine(topk: int) -> EqualArm:
    """`topk` picks of 32 FFN experts a quarter as wide and 16 zeros: 8 FFN experts a token."""
    held = {"num_ffn_experts": 32, "budget": {"target_ffn_per_token": 8.0}}
    arm = _more(topk, (16, 0, 0), "nonzero", _BASE, **held)
    return replace(arm, against="vanilla fine")


_ORDER = ("zero", "copy", "constant")
_BASE = "K3 mix nonzero"
EQUAL: dict[str, EqualArm] = {
    "vanilla": EqualArm({}, ""),
    "vanilla selected": EqualArm(ARMS["vanilla selected"], ""),
    "K3 mix none": _more(3, _MIX, "none"),
    "K3 mix selected": _more(3, _MIX, "selected", _BASE),
    _BASE: _more(3, _MIX, "nonzero"),
    "K4 mix nonzero": _more(4, _MIX, "nonzero", _BASE),
    "K3 zero nonzero": _more(3, _ZERO, "nonzero", _BASE),
    "K4 zero nonzero": _more(4, (8, 0, 0), "nonzero", _BASE),
    "K3 copy selected": _more(3, _COPY, "selected", _BASE),
    "K3 null nonzero": replace(_more(3, _ZERO, "nonzero", _BASE), null=1.0),
    "K3 mix nonzero, residual": _more(3, _MIX, "nonzero", _BASE, gating_residual=True),
    "K3 mix nonzero, tau": _more(3, _MIX, "nonzero", _BASE, budget={**_HELD, "controller": "tau"}),
    "K3 mix nonzero, bias alone": _more(3, _MIX, "nonzero", _BASE, **_BIAS_ALONE),
    # Each FFN expert takes the tokens whose score is above its own threshold (arXiv 2603.11535).
    "threshold": replace(_more(8, (8, 0, 0), "nonzero", _BASE, **_BIAS_ALONE), null=0.0),
    "vanilla fine": EqualArm(
        {"num_ffn_experts": 32, "router_topk": 8, "gate_normalization": "selected"},
        "",
        "vanilla selected",
    ),
    "fine K10": _fine(10),
    "fine K12": _fine(12),
    "fine K16": _fine(16),
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
        """The key among the results."""
        parts = (self.stage, self.arm, self.size, self.what, self.seed)
        tuning = (self.rate, self.std) if self.stage.startswith("tune") else ()
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
        "moe": {**_PAPER, **(EQUAL[run.arm].moe if run.arm in EQUAL else ARMS[run.arm])},
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
    if content["moe"]["num_ffn_experts"] == 32:
        content["moe"]["ffn_hidden_size"] = shape["ffn_hidden_size"] // 4
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
    often = {kind: _OFTEN.get(kind, 1) for kind in kinds}
    mixture = {kind: often[kind] / sum(often.values()) for kind in kinds}
    return Mixed(Part(out / "corpora", TEXT, held_out), [(1, mixture)], BATCH, LENGTH, seed)


def tie_zero_experts(models: list[Any], part: float) -> None:
    """Give all zero experts of a layer one logit, that of this part of their mean weights."""
    from moepp_megatron.moe.layer import moepp_layers

    for layer in (layer for model in models for layer in moepp_layers(model)):
        zeros = layer.router.moepp.columns(ZERO)

        def tied(rows: Tensor, zeros: slice = zeros) -> Tensor:
            rows = rows.clone()
            rows[zeros] = part * rows[zeros].mean(dim=0)
            return rows

        with torch.no_grad():
            layer.router.weight.copy_(tied(layer.router.weight))
        layer.router.weight.register_hook(tied)


class Picks:
    """FFN experts of tokens, counted while it is entered."""

    def __init__(self, models: list[Any]) -> None:
        from moepp_megatron.moe.layer import moepp_layers

        self._layers = [layer for model in models for layer in moepp_layers(model)]
        self._passes: list[NDArray[np.float64]] = []

    def __enter__(self) -> Picks:
        """Watch the routers."""

        def look(router: Any, _: Any, routing: Any) -> None:
            ffn_T = routing.routing_map[:, : router.moepp.num_ffn_experts].sum(dim=1)
            self._passes.append(ffn_T.view(-1, BATCH).double().mean(dim=0).numpy())

        self._hooks = [layer.router.register_forward_hook(look) for layer in self._layers]
        return self

    def __exit__(self, *_: object) -> None:
        """Leave them alone."""
        for hook in self._hooks:
            hook.remove()

    @property
    def mean(self) -> float | None:
        """A token's; None of a vanilla model."""
        return round(float(np.mean(self._passes)), 4) if self._passes else None

    @property
    def spread(self) -> float | None:
        """Deviation of the rows of eight ranks that share a batch, over their mean."""
        if not self._passes:
            return None
        ranks = np.array(self._passes).reshape(len(self._passes), 8, -1).mean(axis=2)
        return round(float((ranks.std(axis=1, ddof=1) / ranks.mean(axis=1)).mean()), 4)


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
    if run.arm in EQUAL and (null := EQUAL[run.arm].null) is not None:
        tie_zero_experts(model.models, null)
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
    valid, picks = {}, {}
    for kind in run.kinds:
        with Picks(model.models) as seen:
            loss = validation_loss(model, sequences(out, (kind,), 7, True), config, layout)
        valid[kind], picks[kind] = round(loss, 5), seen.mean
    with Picks(model.models) as mixed:
        validation_loss(model, sequences(out, run.kinds, 7, True), config, layout)
    per_token = training_flops_per_token(config, float(np.mean(shares)))
    return {
        "run": asdict(run),
        "valid": valid,
        "ffn": picks,
        "spread": mixed.spread,
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
