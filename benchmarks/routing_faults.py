"""What the routing guard tells and does: switches of the data, planted faults, and nothing at all.

    python -m benchmarks.routing_faults --out FOLDER [--minutes 60] [--set prove]

Trains a small model (3 layers of 8+4 experts, 64 wide, 3,072 tokens a step) as `moepp train` does,
with `routing_guard: safe` and everything else at its default, on corpora from what this machine
holds (`fault_corpora`). Each base run is saved at step 150; what happens to it starts from there.
Resumable: each case is one line of FOLDER/SET.jsonl, and those that are there are not run again.
The table is printed at the end, and with `--minutes 0` alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.fault_corpora import VOCAB_SIZE, Corpora, Mixed, Mixture
from benchmarks.faults_table import table
from moepp_megatron.config import Layout, parse_config
from moepp_megatron.observe.alerts import read_alerts
from moepp_megatron.runtime import cpu_support, distributed
from moepp_megatron.runtime.rank import RankEnvironment

SAVED, HEALTHY, LENGTH, BATCH = 150, 150, 64, 48
_WHOLE, _MIXED, _FAULT, _LONG = 20, 40, 80, 500
# Set by --no-numerical-guard.
_NUMERICAL_GUARD = True


@dataclass(frozen=True)
class Case:
    """Something that happens to a base run behind its step 150.

    Attributes:
        kind: `healthy`, `switch`, `mixture`, `burst`, `collapse`, `dead` or `rate`.
        base: Corpus of the base run.
        seed: Its seed.
        other: Corpus that comes.
        share: Its share of the sequences.
        steps: Steps behind the base run's; of a burst the noisy ones. Of `rate` from the first.
        layer: Layer of a fault; None for all.
        factor: Of the learning rate.
        guarded: Whether the guard acts; without, it does nothing at all.
    """

    kind: str
    base: str
    seed: int
    other: str = ""
    share: float = 1.0
    steps: int = HEALTHY
    layer: int | None = None
    factor: float = 1.0
    guarded: bool = True

    @property
    def name(self) -> str:
        """What identifies it among the results."""
        parts = [self.kind, self.base, self.seed, self.other, self.share, self.steps]
        parts += [self.layer or "all", self.factor, "" if self.guarded else "off"]
        return " ".join(str(part) for part in parts if part != "")


def cases(which: str) -> Iterator[Case]:
    """The cases of a set, in an order in which any number of them says something."""
    bases, pairs = _SETS[which]
    for seed, (base, others) in enumerate(zip(bases, pairs, strict=True), _SEEDS[which]):
        yield Case("healthy", base, seed)
        for other in others:
            yield Case("switch", base, seed, other, steps=_WHOLE)
        for guarded in (True, False):
            yield Case("collapse", base, seed, steps=_FAULT, guarded=guarded)
        for other, share in zip(others, (0.1, 0.2), strict=False):
            yield Case("mixture", base, seed, other, share, _MIXED)
    for seed, base in enumerate(bases, _SEEDS[which]):
        for guarded in (True, False):
            yield Case("collapse", base, seed, steps=_FAULT, layer=2, guarded=guarded)
        yield Case("dead", base, seed, steps=120, layer=2)
        yield Case("burst", base, seed, "noise", steps=10)
        yield Case("burst", base, seed, "noise", steps=30)
        yield Case("rate", base, seed, steps=120, factor=25.0)
        yield Case("rate", base, seed, steps=120, factor=250.0)
    # Long ones of other seeds, to say how rare false alarms are.
    for seed, base in enumerate(bases * 2, _SEEDS[which] + 50):
        yield Case("healthy", base, seed, steps=_LONG)


_SETS: dict[str, tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]] = {
    "choose": (
        ("prose", "python", "json", "french"),
        (("c", "french", "perl"), ("perl", "line", "prose"), ("numbers", "prose"), ("russian",)),
    ),
    "prove": (
        ("markdown", "javascript", "german", "cpp"),
        (
            ("cpp", "swedish", "line"),
            ("html", "xml", "noise"),
            ("manual", "markdown", "cmake"),
            ("xml", "javascript", "german"),
        ),
    ),
}
_SEEDS = {"choose": 101, "prove": 201}


def settings(case: Case, folder: Path, steps: int, load: Path | None) -> dict[str, Any]:
    """The configuration of a run, whose files go to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    rate = 2e-3 * case.factor
    return {
        "run": {"dir": str(folder)},
        "data": {"path": str(folder), "tokenizer": str(folder / "tokenizer.json")},
        "model": {
            "num_layers": 3,
            "hidden_size": 64,
            "ffn_hidden_size": 128,
            "num_attention_heads": 4,
            "seq_length": LENGTH,
            "vocab_size": VOCAB_SIZE,
            "init_method_std": 0.05,
        },
        "moe": {"num_ffn_experts": 8},
        "optimizer": {"lr": rate, "min_lr": rate / 10, "warmup_iters": 15, "decay_iters": 400},
        "training": {
            "train_iters": steps,
            "global_batch_size": BATCH,
            "micro_batch_size": BATCH,
            "seed": case.seed,
            "eval_iters": 0,
        },
        "checkpoint": {
            "save_interval": SAVED if load is None else 0,
            "load": None if load is None else str(load),
        },
        "routing_guard": "safe" if case.guarded else "off",
        "resilience": {"guard": _NUMERICAL_GUARD},
    }


def plant(model: Any, case: Case) -> None:
    """Change weights as a bad update would leave them."""
    from moepp_megatron.moe.layer import moepp_layers

    with torch.no_grad():
        for chunk in model.models:
            for layer in moepp_layers(chunk):
                if case.layer in (None, layer.layer_number):
                    _FAULTS[case.kind](layer.router)
    model.optimizer.reload_model_params()


def _collapse(router: Any) -> None:
    """Zero-computation experts in pairs of opposite rows: one of each pair wins with any token."""
    ffn = router.moepp.num_ffn_experts
    rows = router.weight[ffn:]
    rows.mul_(2.0)
    rows[1::2] = -rows[::2]
    router.weight[:ffn].div_(10.0)
    if router.residual_weight is not None:
        router.residual_weight.zero_()


def _kill(router: Any) -> None:
    """FFN expert 0 gets the mean of the others' logits, so it is never among a token's best."""
    router.weight[0] = router.weight[1:].mean(dim=0)
    if router.residual_weight is not None:
        router.residual_weight[0] = router.residual_weight[1:].mean(dim=0)


_FAULTS: dict[str, Callable[[Any], None]] = {"collapse": _collapse, "dead": _kill}


def data_of(case: Case, corpora: Corpora) -> Mixed:
    """The sequences of a run, which change behind its step 150."""
    schedule: list[tuple[int, Mixture]] = [(1, {case.base: 1.0})]
    if case.other:
        shares = {case.base: 1.0 - case.share, case.other: case.share}
        schedule.append((SAVED + 1, {kind: share for kind, share in shares.items() if share}))
    if case.kind == "burst":
        schedule.append((SAVED + 1 + case.steps, {case.base: 1.0}))
    return Mixed(corpora, schedule, BATCH, LENGTH, case.seed)


def train(
    case: Case, folder: Path, data: Mixed, steps: int, load: Path | None = None
) -> dict[str, Any]:
    """Train to `steps`; from the base run's checkpoint if there is one.

    Returns:
        Losses and FFN shares (as wanted) by step, alerts, and why the run ended early.
    """
    from benchmarks.fresh_ranks import forget_model
    from moepp_megatron.runtime.distributed import build_groups
    from moepp_megatron.training import trainer as module
    from moepp_megatron.training.collect import mean_loss
    from moepp_megatron.training.part import Part, Parts, Step
    from moepp_megatron.training.parts.routing_counts import RoutingCounts

    shutil.rmtree(folder, ignore_errors=True)
    config = parse_config(settings(case, folder, steps, load))
    layout = Layout.from_config(config, 1)
    forget_model()
    build_groups(config, layout)
    with (
        mock.patch.dict(module.DATASETS, gpt=lambda *_: (data, None, None)),
        mock.patch.object(module.Tokenizer, "load", return_value=None),
    ):
        trainer = module.Trainer(config, layout)
    if load is not None and case.kind in _FAULTS:
        plant(trainer.model, case)
    losses: list[float] = []
    shares_L: list[list[float]] = []
    (counts,) = [part for part in trainer.parts if isinstance(part, RoutingCounts)]

    class Watch(Part):
        """Notes the loss and the FFN share of each layer of every batch."""

        def judge(self, step: Step) -> tuple[()]:
            """Look at a step, or at a refused batch."""
            losses.append(mean_loss(step.result.losses))
            selected = counts.selections()
            ffn = selected[:, : config.moe.num_ffn_experts].sum(dim=1) / selected.sum(dim=1)
            shares_L.append(ffn.tolist())
            return ()

    trainer.parts = Parts([Watch(), *trainer.parts])
    ended = ""
    try:
        trainer.run()
    except RuntimeError as error:
        ended = str(error).splitlines()[0]
    alerts = [json.loads(alert.to_json_line()) for alert in read_alerts(folder / "alerts.jsonl")]
    return {"losses": losses, "shares": shares_L, "alerts": alerts, "ended": ended}


def run(
    case: Case,
    corpora: Corpora,
    work: Path,
    data: Callable[[Case, Corpora], Mixed] = data_of,
) -> dict[str, Any]:
    """One case; the base run is made where it is missing."""
    if case.kind == "rate":
        return train(case, work / "run", data(case, corpora), case.steps)
    # Saved without a case, so that all cases of a base have the same beginning.
    base = work / f"{case.base} {case.seed}"
    checkpoint = base / "checkpoints" / f"step_{SAVED:08d}"
    if not (work / f"{base.name}.json").exists():
        healthy = Case("healthy", case.base, case.seed)
        before = train(healthy, base, data(healthy, corpora), SAVED)
        (work / f"{base.name}.json").write_text(json.dumps(before))
    before = json.loads((work / f"{base.name}.json").read_text())
    steps = SAVED + (case.steps + 40 if case.kind == "burst" else case.steps)
    after = train(case, work / "run", data(case, corpora), steps, checkpoint)
    after["alerts"] = [*before["alerts"], *after["alerts"]]
    after["before"] = before["losses"]
    return after


def work_off(
    todo: list[Case],
    out: Path,
    which: str,
    minutes: float,
    data: Callable[[Case, Corpora], Mixed] = data_of,
) -> list[dict[str, Any]]:
    """Run the cases that OUT/SET.jsonl lacks, within the time; all results that it has then."""
    results = out / f"{which}.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    done = {result["name"]: result for result in map(json.loads, lines)}
    until = time.monotonic() + 60 * minutes
    todo = [case for case in todo if case.name not in done]
    if todo and minutes > 0:
        cpu_support.install()
        distributed.start(RankEnvironment())
        corpora, work = Corpora(out / "corpora"), out / which
        for case in todo:
            if time.monotonic() > until:
                break
            started = time.monotonic()
            result = {"name": case.name, "case": vars(case), **run(case, corpora, work, data)}
            done[case.name] = result
            with results.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{case.name}: {time.monotonic() - started:.0f} s", flush=True)
        distributed.stop()
    return list(done.values())


def main() -> None:
    """Run what is missing, within the time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", default="prove", choices=sorted(_SETS))
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--kinds", nargs="*", help="kinds of cases; all by default")
    parser.add_argument("--bases", nargs="*", help="corpora of base runs; all by default")
    parser.add_argument("--no-numerical-guard", action="store_true", help="no batch is refused")
    arguments = parser.parse_args()
    global _NUMERICAL_GUARD
    _NUMERICAL_GUARD = not arguments.no_numerical_guard
    todo = list(cases(arguments.set))
    todo = [case for case in todo if not arguments.kinds or case.kind in arguments.kinds]
    todo = [case for case in todo if not arguments.bases or case.base in arguments.bases]
    print(table(work_off(todo, arguments.out, arguments.set, arguments.minutes)))


if __name__ == "__main__":
    main()
