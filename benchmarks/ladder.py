"""Does MoE++ pay? A ladder of model sizes, each of which every arm climbs with the same care.

    python -m benchmarks.ladder OUT [--stage STAGE ...] [--arms ARM ...] [--until HH:MM] [--list]
    python -m benchmarks.ladder OUT --collect FILE

Stages, in order:

tune    On the smallest size, seed 0, each arm finds its learning rate and its initial weights by
        the same rule (`tuned`). Larger sizes scale the rate by 1/width and the initial standard
        deviation by 1/sqrt(width).
rungs   Three sizes, seeds 1 to 3, mixture A: the same steps as vanilla, and as many steps as come
        to vanilla's FLOP (`flops.py`, with the FFN share that the run of equal steps measured).
decide  One setting of the paper's arm at a time: two sizes, seeds 11 to 15, mixture B, of corpora
        that chose nothing.
top     A fourth size at vanilla's FLOP. Its losses were predicted from the rungs beforehand.

A mixture is a third each of source text, English prose and other languages, from what this machine
holds (`fault_corpora`). Within a seed, all arms see the same tokens in the same order as far as they
go, and validate on the same held-out tenth. A run is one process on one core; it leaves OUT/NAME.json
and is not run again. Several processes may work at once on different arms. `--collect` writes all
results into one file, a line each, from which OUT is filled where it is empty.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.fault_corpora import VOCAB_SIZE, Corpora, Mixed
from moepp_megatron.config import Config, Layout, parse_config
from moepp_megatron.config.flops import training_flops_per_token
from moepp_megatron.config.vanilla import vanilla
from moepp_megatron.runtime import cpu_support, distributed
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.runtime.quiet import quiet
from moepp_megatron.runtime.rank import RankEnvironment

LENGTH, BATCH, TEXT = 128, 32, 6_000_000
K = 2
VALIDATION_BATCHES = 3
KINDS = {
    "A": {"code": ("python", "c"), "prose": ("manual", "rst"), "languages": ("french", "german")},
    "B": {"code": ("cpp", "perl"), "prose": ("prose", "markdown"),
          "languages": ("russian", "swedish")},
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """A rung: the model's shape, and the steps of vanilla's run."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    steps: int


SIZES = {
    "S": Size(3, 48, 128, 3, 160),
    "M": Size(4, 64, 176, 4, 240),
    "L": Size(4, 96, 256, 6, 340),
    "XL": Size(6, 144, 384, 6, 560),
}
SMALLEST, TOP = SIZES["S"], "XL"

# What an arm changes in section `moe` of the paper's layer; balance as in the quickstart.
_PAPER: dict[str, Any] = {"num_ffn_experts": 8, "tau": 0.75, "balance_coeff": 0.05}
_IDENTITY = {
    "num_zero_experts": 0, "num_copy_experts": 4, "num_constant_experts": 0,
    "gating_residual": False, "budget": {"target_ffn_per_token": 0.65 * K},
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "vanilla selected": {"gate_normalization": "selected"},
    "paper": {},
    "selected": {"gate_normalization": "selected"},
    "no residual": {"gating_residual": False},
    "identity": _IDENTITY,
}
# Changes of the paper's arm whose worth stage `decide` measures, at that arm's rate and weights.
CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "selected": {"moe.gate_normalization": "selected"},
    "no residual": {"moe.gating_residual": False},
    "balance 0.01": {"moe.balance_coeff": 0.01},
    "balance 0.2": {"moe.balance_coeff": 0.2},
    "budget": {"moe.budget.target_ffn_per_token": 0.65 * K},
    "init 0.02": {"model.init_method_std": 0.02},
    "init twice": {},
}
RATES, STDS = (1.5e-3, 3e-3, 6e-3), (0.03, 0.06, 0.12)


@dataclass(frozen=True)
class Run:
    """A run by what decides its result.

    Attributes:
        stage: The stage.
        arm: A name of `ARMS`.
        size: A name of `SIZES`.
        seed: Of the initial weights and of the order of the data.
        steps: Steps; the schedule ends with them.
        rate: Learning rate on the smallest size.
        std: Initial standard deviation on the smallest size.
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


class Missing(Exception):
    """A run depends on this one, whose result is not there."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.name)
        self.run = run


class Results:
    """What has been run, in a folder."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def path(self, run: Run) -> Path:
        """Where a result lies."""
        return self.out / f"{run.name}.json"

    def of(self, run: Run) -> dict[str, Any]:
        """The result of a run; `Missing` if there is none."""
        if not self.path(run).exists():
            raise Missing(run)
        found: dict[str, Any] = json.loads(self.path(run).read_text())
        return found


def tuned(arm: str, results: Results) -> tuple[float, float]:
    """Learning rate and initial weights of an arm, the same rule for each.

    First the rate at the middle of `STDS`, then the standard deviation at the best rate: the best
    of three values a factor of two apart; the range is widened while the best is at its end.
    """
    rate = _best(RATES, lambda value: _tune(arm, value, STDS[1], results))
    return rate, _best(STDS, lambda value: _tune(arm, rate, value, results))


def _tune(arm: str, rate: float, std: float, results: Results) -> float:
    run = Run("tune", arm, "S", 0, SMALLEST.steps, rate, std)
    return valid(results.of(run))


def _best(values: tuple[float, ...], loss: Any) -> float:
    found = {value: loss(value) for value in values}
    while True:
        best = min(found, key=found.__getitem__)
        if best == min(found):
            found[best / 2] = loss(best / 2)
        elif best == max(found):
            found[best * 2] = loss(best * 2)
        else:
            return best


def valid(result: dict[str, Any]) -> float:
    """Validation loss, the mean of the corpora."""
    return float(np.mean(list(result["valid"].values())))


def chains(stage: str, arms: list[str], results: Results) -> Iterator[Iterator[Run]]:
    """The runs of a stage, in chains: a run may depend on those before it in its chain.

    A chain raises `Missing` where it depends on a run of another stage.
    """
    if stage == "tune":
        yield from (_tuning(arm, results) for arm in arms)
    elif stage == "rungs":
        places = [(size, seed) for size in SIZES if size != TOP for seed in (1, 2, 3)]
        yield from (_rung(arm, *place, results) for place in places for arm in arms)
    elif stage == "decide":
        places = [(size, seed) for seed in range(11, 16) for size in ("S", "M")]
        yield from (_decide(what, *place, results) for place in places for what in CHANGES)
    elif stage == "top":
        yield from (_top(arm, results) for arm in arms)
    else:
        raise ValueError(f"no stage is called {stage}")


def _tuning(arm: str, results: Results) -> Iterator[Run]:
    tuned(arm, results)
    yield from ()


def _decide(what: str, size: str, seed: int, results: Results) -> Iterator[Run]:
    tuning = tuned("paper", results)
    yield Run("decide", "paper", size, seed, SIZES[size].steps, *tuning, "B", what)


def _top(arm: str, results: Results) -> Iterator[Run]:
    shares = [results.of(_equal_steps(arm, "L", seed, results))["share"] for seed in (1, 2, 3)]
    steps = steps_for_flop(arm, TOP, float(np.mean(shares)))
    yield Run("top", arm, TOP, 1, steps, *tuned(arm, results), what="flop")


def _equal_steps(arm: str, size: str, seed: int, results: Results) -> Run:
    return Run("rungs", arm, size, seed, SIZES[size].steps, *tuned(arm, results))


def _rung(arm: str, size: str, seed: int, results: Results) -> Iterator[Run]:
    first = _equal_steps(arm, size, seed, results)
    yield first
    steps = steps_for_flop(arm, size, results.of(first)["share"])
    if steps != first.steps:
        yield Run("rungs", arm, size, seed, steps, first.rate, first.std, what="flop")


def steps_for_flop(arm: str, size: str, share: float) -> int:
    """Steps of an arm that come to the FLOP of vanilla's run, at a measured FFN share."""
    of = {
        name: config_of(Run("", name, size, 0, 1, 1e-3, 0.05), Path()) for name in ("vanilla", arm)
    }
    ratio = training_flops_per_token(of["vanilla"], 1.0) / training_flops_per_token(of[arm], share)
    return round(SIZES[size].steps * ratio)


def config_of(run: Run, folder: Path) -> Config:
    """The configuration of a run, of which files would go to `folder`."""
    size, arm = SIZES[run.size], run.arm
    narrow = SMALLEST.hidden / size.hidden
    content: dict[str, Any] = {
        "run": {"dir": str(folder)},
        "data": {"path": str(folder), "tokenizer": str(folder / "tokenizer.json")},
        "model": {
            "num_layers": size.layers,
            "hidden_size": size.hidden,
            "ffn_hidden_size": size.ffn,
            "num_attention_heads": size.heads,
            "seq_length": LENGTH,
            "vocab_size": VOCAB_SIZE,
            "init_method_std": run.std * narrow**0.5 * (2 if run.what == "init twice" else 1),
        },
        "moe": {**_PAPER, **ARMS[arm]},
        "optimizer": {
            "lr": run.rate * narrow,
            "min_lr": run.rate * narrow / 10,
            "warmup_iters": run.steps // 10,
        },
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
    for setting, value in CHANGES.get(run.what, {}).items():
        *path, last = setting.split(".")
        section = content
        for key in path:
            section = section.setdefault(key, {})
        section[last] = value
    config = parse_config(content)
    return vanilla(config) if arm.startswith("vanilla") else config


@dataclass(frozen=True)
class Part:
    """The part of the corpora that is trained on, or the tenth that is held out."""

    corpora: Corpora
    held_out: bool

    def tokens(self, kind: str) -> NDArray[np.int64]:
        """[tokens] int64."""
        tokens = self.corpora.tokens(kind)
        cut = len(tokens) * 9 // 10
        return tokens[cut:] if self.held_out else tokens[:cut]


def sequences(part: Part, kinds: tuple[str, ...], seed: int) -> Mixed:
    """Sequences from anywhere in the corpora, each as often as another."""
    mixture = {kind: 1 / len(kinds) for kind in kinds}
    return Mixed(part, [(1, mixture)], BATCH, LENGTH, seed)  # type: ignore[arg-type]


def train(run: Run, out: Path) -> tuple[Any, Config, Layout, dict[str, Any]]:
    """The trained model, its configuration and layout, and the losses and FFN shares of the steps."""
    from benchmarks.fresh_ranks import forget_model
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.collect import mean_loss
    from moepp_megatron.training.part import Parts
    from moepp_megatron.training.parts.budget import BudgetControl
    from moepp_megatron.training.parts.routing_counts import RoutingCounts
    from moepp_megatron.training.setup import build_training_model
    from moepp_megatron.training.step import training_step

    config = config_of(run, out)
    layout = Layout.from_config(config, 1)
    forget_model()
    distributed.build_groups(config, layout)
    model = build_training_model(config)
    routing = None if run.arm.startswith("vanilla") else RoutingCounts(model, config, layout)
    budget = None
    if routing is not None and config.moe.budget.acts:
        budget = BudgetControl(config, model, routing, None)
    parts = Parts([part for part in (routing, budget) if part is not None])
    kinds = sum(KINDS[run.mixture].values(), ())
    data = sequences(Part(Corpora(out / "corpora", TEXT), held_out=False), kinds, run.seed)
    (batches,) = rank_batches(data, 0, config, 1)
    model.set_training(True)
    losses, shares = [], []
    for step in range(1, run.steps + 1):
        parts.begin_step(step, layout)
        losses.append(mean_loss(training_step(model, [batches], config, layout, parts).losses))
        if budget is not None:
            budget.learn(step)
        shares.append(1.0 if routing is None else float(routing.collect()["ffn_fraction"]))  # type: ignore[arg-type]
    return model, config, layout, {"losses": losses, "shares": shares}


def measure(run: Run, out: Path) -> dict[str, Any]:
    """Train and validate: loss of each corpus, FFN share, FLOP."""
    from moepp_megatron.training.parts.validation import validation_loss

    started = time.process_time()
    model, config, layout, record = train(run, out)
    held_out = Part(Corpora(out / "corpora", TEXT), held_out=True)
    kinds = sum(KINDS[run.mixture].values(), ())
    share = float(np.mean(record["shares"]))
    flop = training_flops_per_token(config, share) * run.steps * BATCH * LENGTH
    return {
        "run": run.__dict__,
        "valid": {
            kind: round(validation_loss(model, sequences(held_out, (kind,), 7), config, layout), 5)
            for kind in kinds
        },
        "loss": round(float(np.mean(record["losses"][-20:])), 5),
        "share": round(share, 5),
        "share at the end": round(float(np.mean(record["shares"][-20:])), 5),
        "flop": flop,
        "cpu_s": round(time.process_time() - started, 1),
    }


def missing(stages: list[str], arms: list[str], results: Results) -> Iterator[Run]:
    """Runs without a result, all of whose dependencies have one."""
    for stage in stages:
        for chain in chains(stage, arms, results):
            try:
                for run in chain:
                    results.of(run)
            except Missing as found:
                yield found.run


@contextmanager
def taken(run: Run, out: Path) -> Iterator[bool]:
    """Whether this process has the run; another may have it."""
    with (out / f"{run.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def one_run(stages: list[str], arms: list[str], results: Results) -> bool:
    """Run the first run that is missing and that no other process has; False if there is none."""
    for run in missing(stages, arms, results):
        with taken(run, results.out) as mine:
            # Another process may have finished it since.
            if mine and not results.path(run).exists():
                result = measure(run, results.out)
                write_atomic(results.path(run), json.dumps(result).encode())
                numbers = f"{valid(result):.4f}, share {result['share']:.3f}"
                print(f"{run.name}: {numbers}, {result['cpu_s']:.0f} s", flush=True)
                return True
    return False


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--stage", nargs="*", default=["tune", "rungs", "decide"])
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--until", metavar="HH:MM", help="begin no run after this time")
    parser.add_argument(
        "--list", action="store_true", help="print what can be run now, run nothing"
    )
    parser.add_argument(
        "--collect", type=Path, metavar="FILE", help="write all results, a line each"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.out)
    if arguments.collect:
        found = [
            json.dumps(json.loads(path.read_text()))
            for path in sorted(arguments.out.glob("*.json"))
        ]
        write_atomic(arguments.collect, "".join(f"{line}\n" for line in found).encode())
        return
    if arguments.list:
        for run in missing(arguments.stage, arguments.arms, results):
            print(run.name)
        return
    quiet()
    cpu_support.install()
    distributed.start(RankEnvironment())
    while not arguments.until or f"{datetime.now():%H:%M}" < arguments.until:
        if not one_run(arguments.stage, arguments.arms, results):
            if not any(missing(arguments.stage, arguments.arms, results)):
                break
            # What is left depends on runs that other processes have.
            time.sleep(5)
    distributed.stop()


if __name__ == "__main__":
    main()
