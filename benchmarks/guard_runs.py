"""Runs that the routing guard is judged by: healthy ones, other data, planted faults.

    python -m benchmarks.guard_runs --out FOLDER --set choose [--only TEXT] [--list]
    python -m benchmarks.guard_runs --out FOLDER --set prove --live

Small models (3 layers of 8 + 4 experts, 48 wide, sequences of 128 tokens) on what this machine
holds (`fault_corpora`), in one process. A base run is saved at step 150, and what happens begins
there. Without `--live` nothing watches and every series that a detector could use is recorded in
FOLDER/SET/<case>.npz, for `guard_table`. With it the guard acts (`routing_guard: safe`), and
FOLDER/SET-live/<case>.json holds losses, FFN shares and alerts. Cases that are there are not run
again. Limits were chosen on the set `choose` and proved on `prove`: other corpora, seeds, faults.
Cases of the set `unseen`, with what is expected of each, are lines of `guard_unseen.txt`.
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

import numpy as np
import torch
from torch import Tensor

from benchmarks.fault_corpora import VOCAB_SIZE, Corpora, Mixed, Mixture
from moepp_megatron.config import Layout, parse_config
from moepp_megatron.observe.alerts import read_alerts
from moepp_megatron.runtime import cpu_support, distributed
from moepp_megatron.runtime.rank import RankEnvironment
from moepp_megatron.training.part import Part, Step

SAVED, HEALTHY, SWITCH, MIXTURE, FAULT, LENGTH = 150, 350, 20, 30, 60, 128
K = 2
LAYERS: dict[str, dict[str, Any]] = {
    "tau 0.1": {"tau": 0.1},
    "tau 0.4": {"tau": 0.4},
    "tau 0.75": {},
    "tau 1": {"tau": 1.0},
    **{
        f"share {share}": {"budget": {"target_ffn_per_token": K * share}}
        for share in (0.15, 0.3, 0.6, 0.9, 0.45)
    },
}


@dataclass(frozen=True)
class Base:
    """A base run: its corpus, settings of its MoE layers, sequences a step and seed."""

    corpus: str
    layers: str
    batch: int
    seed: int

    @property
    def name(self) -> str:
        """The key among the results."""
        return f"{self.corpus} {self.layers} {self.batch} {self.seed}"


@dataclass(frozen=True)
class Case:
    """An event that befalls a base run after its step 150.

    Attributes:
        base: The base run.
        kind: `healthy`, `switch`, `mixture`, `fault`, or `pair`: a switch or a fault, then another.
        what: The corpus that comes, or the fault; of a pair what comes first, what then (or
            `healthy`) and after how many steps.
        share: Its share of the sequences.
        steps: Steps after the base run's.
    """

    base: Base
    kind: str
    what: str = ""
    share: float = 1.0
    steps: int = HEALTHY

    @property
    def name(self) -> str:
        """The key among the results."""
        return f"{self.base.name} {self.kind} {self.what}".strip()


# A line for each base run: what comes as a whole, and what is mixed in.
_CHOOSE = """\
prose; tau 0.75; 24; 501; c, french, css; perl 0.1, json 0.2
python; share 0.3; 24; 502; perl, line, prose; c 0.1, css 0.25
json; share 0.9; 48; 503; numbers, css, noise; prose 0.1, python 0.15
french; tau 0.1; 24; 504; russian, json, c; russian 0.15, prose 0.1
c; share 0.15; 24; 505; css, numbers, python; french 0.1, perl 0.2
perl; tau 1; 48; 506; python, prose, russian; css 0.1, c 0.2
russian; share 0.6; 24; 507; french, noise, perl; french 0.2, line 0.1
css; tau 0.4; 48; 508; json, c, line; python 0.1, numbers 0.15"""
_PROVE = """\
markdown; tau 0.75; 24; 601; cpp, swedish, base64; html 0.1, javascript 0.2
html; share 0.3; 24; 602; xml, licences, shuffled; cmake 0.1, german 0.25
german; share 0.15; 48; 603; swedish, manual, markdown; swedish 0.1, cpp 0.2
cpp; tau 0.1; 24; 604; javascript, rst, japanese; manual 0.15, xml 0.1
manual; share 0.9; 48; 605; rst, html, licences; markdown 0.1, base64 0.15
javascript; share 0.6; 24; 606; cpp, cmake, german; licences 0.1, rst 0.2
licences; tau 1; 48; 607; manual, xml, javascript; rst 0.1, cmake 0.2
japanese; tau 0.4; 24; 608; german, base64, html; german 0.2, markdown 0.1"""
# More healthy runs at the final limits: corpora of `prove` in other layers, with other seeds, each
# with 24 and with 48 sequences.
_HEALTHY = """\
swedish; tau 0.4; 48; 701
xml; share 0.15; 24; 702
rst; share 0.9; 24; 703
cmake; tau 0.75; 48; 704
cpp; share 0.3; 24; 705
markdown; tau 0.1; 24; 706
german; tau 1; 48; 707
html; share 0.6; 24; 708
javascript; tau 0.4; 24; 709
licences; share 0.15; 48; 710
manual; share 0.9; 24; 711
japanese; tau 0.75; 24; 712
swedish; tau 0.75; 24; 713
xml; share 0.3; 48; 714
rst; tau 0.1; 48; 715
cmake; tau 1; 24; 716
cpp; share 0.6; 48; 717
markdown; tau 0.4; 48; 718
german; share 0.15; 24; 719
html; share 0.9; 48; 720
javascript; tau 0.75; 48; 721
licences; share 0.3; 24; 722
manual; tau 0.1; 48; 723
japanese; tau 1; 48; 724"""
_UNSEEN = Path(__file__).with_name("guard_unseen.txt").read_text()
SETS = {"choose": _CHOOSE, "prove": _PROVE, "healthy": _HEALTHY, "unseen": _UNSEEN}
# Faults with their strength: those of one set are no copies of the other's.
FAULTS: dict[str, dict[str, float]] = {
    "choose": {
        "collapse": 2.0,
        "collapse of one": 2.0,
        "dead": 3,
        "weights": 10.0,
        "logit": 5.0,
        "residual": 20.0,
        "swap": 0,
        "rate": 20.0,
        "attention": 6.0,
        "decay": 0.05,
    },
    "prove": {
        "collapse": 3.0,
        "collapse of one": 3.0,
        "dead": 4,
        "weights": 20.0,
        "logit": 8.0,
        "residual": 30.0,
        "swap": 1,
        "noise": 4.0,
        "rate": 30.0,
        "attention": 4.0,
        "decay": 0.08,
    },
    "healthy": {},
    "unseen": {
        "collapse": 2.5,
        "dead": 5,
        "weights": 15.0,
        "residual": 25.0,
        "swap": 2,
        "rate": 10.0,
        "attention": 6.0,
        "drift": 1.1,
    },
}
_RATE_STEPS = 10
# Steps between the events of pairs, by set; steps after the second; faults that come second.
_GAPS = {"choose": (13, 18, 24, 31, 6, 21), "prove": (14, 20, 27, 30, 8, 17)}
_PAIR = 40
# Faults of more than the routers, or step by step; the first three last for `_RATE_STEPS` steps.
OF_MODEL = ("rate", "decay", "drift", "attention")
_SECOND = ("collapse", "swap", "weights", "logit", "dead", "residual")
_FAULTS = {fault for faults in FAULTS.values() for fault in faults}


def _base(line: str) -> Base:
    corpus, layers, batch, seed = line.split("; ")[:4]
    return Base(corpus, layers, int(batch), int(seed))


def _unseen() -> Iterator[Case]:
    """The cases that are written down one by one."""
    lengths = {"healthy": HEALTHY, "switch": SWITCH, "mixture": MIXTURE, "fault": FAULT}
    lines = [line for line in _UNSEEN.splitlines() if not line.startswith("#")]
    for place, line in enumerate(lines):
        if line.startswith("  "):
            base = _base([above for above in lines[:place] if not above.startswith("  ")][-1])
            kind, *what = line.split(":")[0].split()
            share = float(what.pop()) if kind == "mixture" else 1.0
            steps = lengths[kind] if kind in lengths else int(what[-1]) + FAULT
            yield Case(base, kind, " ".join(what), share, steps)


def cases(which: str) -> Iterator[Case]:
    """The cases of a set."""
    if which == "unseen":
        yield from _unseen()
        return
    for place, line in enumerate(SETS[which].splitlines()):
        base, (others, mixed) = (
            _base(line),
            [each.split(", ") for each in [*line.split("; ")[4:], "", ""][:2]],
        )
        yield Case(base, "healthy")
        for other in filter(None, others):
            yield Case(base, "switch", other, steps=SWITCH)
        for other, share in (each.split() for each in filter(None, mixed)):
            yield Case(base, "mixture", other, float(share), MIXTURE)
        for fault in FAULTS[which]:
            yield Case(base, "fault", fault, steps=FAULT)
        if which not in _GAPS:
            continue
        gaps, first, second, third = _GAPS[which], *others
        for before, after, gap in (
            (first, second, gaps[place % 4]),
            (second, third, gaps[(place + 1) % 4]),
            (third, base.corpus, gaps[(place + 2) % 6]),
            (second, _SECOND[place % 6], gaps[(place + 3) % 4]),
            (third, _SECOND[(place + 3) % 6], gaps[(place + 4) % 6]),
            (first, "healthy", 60),
        ):
            yield Case(base, "pair", f"{before} {after} {gap}", steps=gap + _PAIR)


def settings(case: Case, folder: Path, steps: int, live: bool) -> dict[str, Any]:
    """The configuration of a run, whose files go to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    base = case.base
    return {
        "run": {"dir": str(folder)},
        "data": {"path": str(folder), "tokenizer": str(folder / "tokenizer.json")},
        "model": {
            "num_layers": 3,
            "hidden_size": 48,
            "ffn_hidden_size": 64,
            "num_attention_heads": 3,
            "seq_length": LENGTH,
            "vocab_size": VOCAB_SIZE,
            "init_method_std": 0.05,
        },
        "moe": {"num_ffn_experts": 8, **LAYERS[base.layers]},
        "optimizer": {"lr": 2e-3, "min_lr": 2e-4, "warmup_iters": 15, "decay_iters": 400},
        "training": {
            "train_iters": steps,
            "global_batch_size": base.batch,
            "micro_batch_size": base.batch,
            "seed": base.seed,
            "eval_iters": 0,
        },
        # The more checkpoints there are, the more a `since` that is too late costs.
        "checkpoint": {"save_interval": 10 if base.seed > 800 else SAVED, "load": "auto"},
        "routing_guard": "safe" if live else "off",
        "resilience": {"guard": live},
    }


def plant(router: Any, fault: str, strength: float, chance: torch.Generator) -> None:
    """Change a router's weights as a bad update would leave them."""
    ffn, weight, residual = router.moepp.num_ffn_experts, router.weight, router.residual_weight
    if fault in ("collapse", "collapse of one"):
        # Zero-computation experts in pairs of opposite rows: one of each wins with any token.
        rows = weight[ffn:]
        rows.mul_(strength)
        rows[1::2] = -rows[::2]
        weight[:ffn].div_(10.0)
        if residual is not None:
            residual.zero_()
    elif fault == "dead":
        # They get the mean of the others' logits, so they are never among a token's best.
        for matrix in (weight, residual):
            if matrix is not None:
                matrix[: int(strength)] = matrix[int(strength) :].mean(dim=0)
    elif fault in ("weights", "drift"):
        weight.mul_(strength)
    elif fault == "residual":
        if residual is not None:
            residual.mul_(strength)
    elif fault == "swap":
        order = torch.randperm(len(weight), generator=chance)
        weight.copy_(weight[order])
    elif fault == "noise":
        weight.add_(strength * weight.std() * torch.randn(weight.shape, generator=chance))
    else:
        raise ValueError(f"no fault is called {fault}")


def _raise_logit(router: Any, strength: float) -> Callable[[Any, Any], None]:
    """A hook that raises an expert's logit by its weights, by the router's next inputs."""

    @torch.no_grad()
    def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
        handle.remove()
        hidden = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
        square = hidden.T @ hidden + 1e-3 * len(hidden) * torch.eye(hidden.shape[1])
        router.weight[0] += strength * torch.linalg.solve(square, hidden.sum(dim=0)).float()

    handle = router.register_forward_pre_hook(hook)
    return hook


def harm(trainer: Any, what: str, strength: float, seed: int) -> None:
    """Plant a fault into a model."""
    from moepp_megatron.moe.layer import moepp_layers

    chance = torch.Generator().manual_seed(seed)
    layers = [layer for chunk in trainer.model.models for layer in moepp_layers(chunk)]
    with torch.no_grad():
        for layer in layers[1:2] if what == "collapse of one" else layers:
            if what == "logit":
                _raise_logit(layer.router, strength)
            elif what == "drift" or what not in OF_MODEL:
                plant(layer.router, what, strength, chance)
        weights = [each for chunk in trainer.model.models for each in chunk.named_parameters()]
        for name, weight in weights:
            if what == "attention" and "self_attention" in name and weight.dim() == 2:
                weight.mul_(strength)
            elif what == "decay":
                weight.mul_(1.0 - strength)
    trainer.model.optimizer.reload_model_params()


class Recorder(Part):
    """Notes all series of every batch, and plants the fault of a case."""

    def __init__(self, trainer: Any, case: Case, strength: float) -> None:
        from moepp_megatron.training.parts.routing_counts import RoutingCountsPart

        self._trainer, self._strength, self._seed = trainer, strength, case.base.seed
        self._fault, self._at = fault_of(case)
        self._batches = 0
        (self._counts,) = [p for p in trainer.parts if isinstance(p, RoutingCountsPart)]
        self._counts.watch(logits=True)
        self.rows: dict[str, list[Any]] = {}
        self._get_lr = trainer.model.scheduler.get_lr

    def begin_step(self, step: int, layout: Layout) -> None:
        """Plant the fault where it is due, or set the learning rate's factor for the batch."""
        self._batches += 1
        lasts = _RATE_STEPS if self._fault in OF_MODEL[:3] else 1
        is_due = 0 < self._batches - self._at <= lasts
        factor = self._strength if is_due and self._fault == "rate" else 1.0
        self._trainer.model.scheduler.get_lr = lambda group: factor * self._get_lr(group)
        if is_due and self._fault not in ("", "rate"):
            harm(self._trainer, self._fault, self._strength, self._seed)

    @torch.no_grad()
    def see(self, chunk: torch.nn.Module, batch: dict[str, Tensor], token_losses: Tensor) -> None:
        """Note each sequence's loss and the token ids."""
        self._add("losses", token_losses.float().mean(dim=1).numpy())
        ids = batch["labels"].reshape(-1).numpy()
        self._add("tokens", np.bincount(ids, minlength=VOCAB_SIZE).astype(np.int32))

    def judge(self, step: Step) -> tuple[()]:
        """Look at a step, or at a refused batch."""
        self._add("step", step.number)
        self._add("selected", self._counts.selections().numpy().astype(np.int32))
        self._add("logits", self._counts.logits())
        return ()

    def _add(self, name: str, value: Any) -> None:
        self.rows.setdefault(name, []).append(value)


def fault_of(case: Case) -> tuple[str, int]:
    """The fault of a case, or none, and the batches before it."""
    if case.kind == "pair":
        first, second, gap = case.what.split()
        at = {first: 0, second: int(gap)}
        return next(((what, at[what]) for what in at if what in _FAULTS), ("", 0))
    return (case.what, 0) if case.kind == "fault" else ("", 0)


def data_of(case: Case, corpora: Corpora) -> Mixed:
    """The sequences of a run, which change after its step 150."""
    base = case.base
    schedule: list[tuple[int, Mixture]] = [(1, {base.corpus: 1.0})]
    if case.kind in ("switch", "mixture"):
        shares = {base.corpus: 1.0 - case.share, case.what: case.share}
        schedule.append((SAVED + 1, {kind: share for kind, share in shares.items() if share}))
    if case.kind == "pair":
        first, second, gap = case.what.split()
        for what, at in ((first, 0), (second, int(gap))):
            if what not in (*_FAULTS, "healthy"):
                schedule.append((SAVED + 1 + at, {what: 1.0}))
    return Mixed(corpora, schedule, base.batch, LENGTH, base.seed)


def train(
    case: Case, folder: Path, corpora: Corpora, steps: int, live: bool, strength: float = 0.0
) -> dict[str, Any]:
    """Train to `steps` from what `folder` holds; every series, alerts, and why it ended early."""
    from benchmarks.fresh_ranks import forget_model
    from moepp_megatron.runtime.distributed import build_groups
    from moepp_megatron.training import trainer as module
    from moepp_megatron.training.part import Parts

    config = parse_config(settings(case, folder, steps, live))
    layout = Layout.from_config(config, 1)
    forget_model()
    build_groups(config, layout)
    data = data_of(case, corpora)
    with (
        mock.patch.dict(module.DATASETS, gpt=lambda *_: (data, None, None)),
        mock.patch.object(module.Tokenizer, "load", return_value=None),
    ):
        trainer = module.Trainer(config, layout)
    recorder = Recorder(trainer, case, strength)
    trainer.parts = Parts([recorder, *trainer.parts])
    ended = ""
    try:
        trainer.run()
    except RuntimeError as error:
        ended = str(error).splitlines()[0]
    alerts = []
    if (folder / "alerts.jsonl").exists():
        alerts = [json.loads(a.to_json_line()) for a in read_alerts(folder / "alerts.jsonl")]
    return {**recorder.rows, "alerts": alerts, "ended": ended}


def run(case: Case, work: Path, corpora: Corpora, live: bool, strength: float) -> dict[str, Any]:
    """One case; the base run is made where it is missing."""
    base = case.base
    of_base = work / f"base {base.name}"
    kept = work / f"base {base.name}{'.json' if live else '.npz'}"
    if not kept.exists():
        shutil.rmtree(of_base, ignore_errors=True)
        write(kept, train(Case(base, "healthy"), of_base, corpora, SAVED, live), live)
    folder = work / f"run {base.name}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(of_base, folder)
    return train(case, folder, corpora, SAVED + case.steps, live, strength)


def write(path: Path, found: dict[str, Any], live: bool) -> None:
    """Arrays of the recorded series, or of a live run what tables need."""
    if not live:
        np.savez_compressed(path, **{k: np.array(v) for k, v in found.items() if k != "alerts"})
        return
    selected = np.array(found["selected"])
    shares = selected[..., :8].sum(axis=-1) / selected.sum(axis=-1)
    losses = np.mean(found["losses"], axis=1)
    kept = {name: found[name] for name in ("step", "alerts", "ended")}
    kept |= {"losses": losses.tolist(), "shares": shares.tolist()}
    path.write_text(json.dumps(kept))


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", default="choose", choices=sorted(SETS))
    parser.add_argument("--live", action="store_true", help="the guard acts")
    parser.add_argument("--only", nargs="*", help="cases whose names contain one of these")
    parser.add_argument("--list", action="store_true", help="print what is missing")
    arguments = parser.parse_args()
    work = arguments.out / (arguments.set + ("-live" if arguments.live else ""))
    work.mkdir(parents=True, exist_ok=True)
    end = ".json" if arguments.live else ".npz"
    texts = arguments.only or [""]
    todo = [case for case in cases(arguments.set) if any(text in case.name for text in texts)]
    todo = [case for case in todo if not (work / f"{case.name}{end}").exists()]
    if arguments.list:
        print("\n".join(case.name for case in todo))
        return
    cpu_support.install()
    distributed.start(RankEnvironment())
    corpora = Corpora(arguments.out / "corpora")
    for case in todo:
        started = time.monotonic()
        strength = FAULTS[arguments.set].get(fault_of(case)[0], 0.0)
        found = run(case, work, corpora, arguments.live, strength)
        write(work / f"{case.name}{end}", found, arguments.live)
        print(f"{case.name}: {time.monotonic() - started:.0f} s {found['ended']}", flush=True)
    distributed.stop()


if __name__ == "__main__":
    main()
