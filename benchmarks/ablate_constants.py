"""Settings of the constant experts against the paper's: validation loss over several seeds.

    python -m benchmarks.ablate_constants --data data/stdlib --out runs/constants --seeds 5
    python -m benchmarks.ablate_constants --data data/stdlib --out runs/constants --scale larger

Trains the quickstart's model (or one that is half as deep again) by `moepp train` once for each
variant and seed, all variants of a seed one after the other, in an order that rotates from seed to
seed. A seed decides initial weights and the order of the data: the variants of a seed see the same
tokens and validate on the same ones, so their losses are compared in pairs. Runs that are finished
are kept: the same command goes on where it was stopped. Runs are in OUT/SCALE, as all training runs
of an experiment are (moepp_megatron/workbench/experiments/training_runs.py).

Writes OUT/SCALE/ablation.json after each run and prints a Markdown table: the mean validation loss,
the mean paired difference to the base with its 95% t-interval over seeds, the FFN experts' share of
the selections and how much of its input a constant expert replaces (both over the last quarter of
the steps).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moepp_megatron.config import ConfigError, load_config
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.workbench.experiments.pilot.statistics import mean_interval
from moepp_megatron.workbench.experiments.runs import Interrupted, RunFailed, in_turns
from moepp_megatron.workbench.experiments.training_runs import TrainingRun, TrainingRuns

BASE = "base"
QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
SCALES: dict[str, list[str]] = {
    "quickstart": [],
    # Half as deep again: constants are added in more layers.
    "larger": ["model.num_layers=6"],
}


def variants(steps: int) -> dict[str, list[str]]:
    """Overrides of each variant.

    Args:
        steps: Of a run; tau is annealed over the first half of them.
    """
    moe = load_config(QUICKSTART).moe
    target = moe.ffn_share * moe.router_topk
    # Half of the way from the target to "all selections go to FFN experts".
    start = (target + moe.router_topk) / 2
    return {
        BASE: [],
        "zero init": ["moe.constant_init=zero"],
        "temperature 0.5": ["moe.constant_temperature=0.5"],
        "temperature 2": ["moe.constant_temperature=2.0"],
        "zero init, temperature 2": ["moe.constant_init=zero", "moe.constant_temperature=2.0"],
        "shared": ["moe.constants_shared=true"],
        "annealed tau": [
            "moe.budget.controller=none",
            f"moe.budget.target_ffn_per_token={target:.6g}",
            f"moe.budget.start_ffn_per_token={start:.6g}",
            f"moe.budget.ramp_steps={max(1, steps // 2)}",
        ],
    }


def overrides_of(arguments: argparse.Namespace, variant: str, seed: int) -> list[str]:
    """All overrides of a run but its folder."""
    return [
        *SCALES[arguments.scale],
        *variants(arguments.steps)[variant],
        f"data.path={arguments.data}",
        f"training.seed={seed}",
        f"training.train_iters={arguments.steps}",
        "training.eval_interval=0",
        f"training.eval_iters={arguments.eval_iters}",
        f"optimizer.warmup_iters={min(15, arguments.steps // 2)}",
        "checkpoint.save_interval=0",
        f"observe.health_interval={max(1, min(10, arguments.steps // 8))}",
        f"parallel.expert_model_parallel_size={arguments.nproc}",
    ]


@dataclass(frozen=True)
class VariantRun(TrainingRun):
    """One variant with one seed."""

    variant: str
    seed: int


def all_runs(arguments: argparse.Namespace, training: TrainingRuns[VariantRun]) -> list[VariantRun]:
    """Every variant with every seed, in their order."""
    chosen = arguments.variants
    names = [name for name in variants(1) if name == BASE or chosen is None or name in chosen]
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    runs = []
    for variant, seed in in_turns(names, seeds):
        name = f"{variant.replace(', ', '+').replace(' ', '-')}-{seed}"
        config = load_config(QUICKSTART, overrides_of(arguments, variant, seed))
        placed = training.placed(name, config)
        runs.append(VariantRun(name, f"seed {seed}, {variant}", placed, variant, seed))
    return runs


def measured(records: list[StepMetrics]) -> dict[str, Any]:
    """What the table needs of a run."""
    last = records[-1]
    late = [record for record in records if record.step > 0.75 * last.step]
    replaced = [
        statistics.fmean(record.router_health["constant_replaced"])
        for record in late
        if record.router_health is not None
    ]
    return {
        "steps": last.step,
        "tokens": last.tokens,
        "valid_loss": last.valid_loss,
        "ffn_share": statistics.fmean(record.ffn_fraction for record in late),
        "constant_replaced": statistics.fmean(replaced),
    }


def summary(found: dict[str, dict[int, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Of each variant, over its seeds; the difference over the seeds that the base has too."""
    rows = {}
    for name, runs in found.items():
        both = sorted(set(runs) & set(found[BASE]))
        differences = [runs[s]["valid_loss"] - found[BASE][s]["valid_loss"] for s in both]
        paired = mean_interval(differences) if both else None
        difference = None if paired is None else paired.mean
        half_width = None if paired is None or paired.high is None else paired.high - paired.mean
        rows[name] = {
            "seeds": sorted(runs),
            "difference": difference,
            "half_width_95": half_width,
            **{
                key: statistics.fmean(run[key] for run in runs.values())
                for key in ("valid_loss", "ffn_share", "constant_replaced")
            },
        }
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| variant | seeds | validation loss | difference to base (95%) | FFN share | replaced |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        difference = "" if row["difference"] is None else f"{row['difference']:+.4f}"
        if row["half_width_95"] is not None:
            difference += f" +- {row['half_width_95']:.4f}"
        lines.append(
            f"| {name} | {len(row['seeds'])} | {row['valid_loss']:.4f} | "
            f"{'' if name == BASE else difference} | {row['ffn_share']:.3f} | "
            f"{row['constant_replaced']:.3f} |"
        )
    return "\n".join(lines)


def write(
    arguments: argparse.Namespace, training: TrainingRuns[VariantRun], runs: list[VariantRun]
) -> dict[str, Any]:
    """Write `ablation.json` of the runs that are finished, the base's among them; returns it."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        records = training.records(run)
        if records is not None:
            overrides = overrides_of(arguments, run.variant, run.seed)
            result = {"overrides": overrides, **measured(records)}
            found.setdefault(run.variant, {})[run.seed] = result
    content = {
        "scale": arguments.scale,
        "steps": arguments.steps,
        "tokens": result["tokens"],
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "summary": summary(found) if BASE in found else {},
        "runs": found,
    }
    text = json.dumps(content, indent=2) + "\n"
    write_atomic(training.path / "ablation.json", text.encode())
    return content


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of runs and results")
    parser.add_argument("--data", type=Path, required=True, help="prepared corpus")
    parser.add_argument("--scale", choices=SCALES, default="quickstart")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from --first-seed")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=120, help="of each run")
    parser.add_argument("--eval-iters", type=int, default=8, help="global batches of validation")
    parser.add_argument("--nproc", type=int, default=2, help="ranks, and expert-parallel size")
    parser.add_argument(
        "--variants", nargs="*", choices=list(variants(1)), help="besides the base; default: all"
    )
    arguments = parser.parse_args()
    for name in ("seeds", "steps", "eval_iters", "nproc"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    arguments.data, arguments.out = arguments.data.resolve(), arguments.out.resolve()
    return arguments


def main() -> None:
    """Run what is missing, write, print."""
    arguments = _arguments()
    training = TrainingRuns[VariantRun](arguments.out / arguments.scale, arguments.nproc)
    runs = all_runs(arguments, training)
    try:
        training.claim(runs)
        training.run_missing(
            runs,
            lambda what: print(what, flush=True),
            lambda run: write(arguments, training, runs),
        )
    except (ConfigError, RunFailed, Interrupted) as stop:
        raise SystemExit(str(stop)) from None
    content = write(arguments, training, runs)
    print(f"\n{arguments.scale}, {arguments.steps} steps, {content['tokens']:,} tokens a run\n")
    print(table(content["summary"]))


if __name__ == "__main__":
    main()
