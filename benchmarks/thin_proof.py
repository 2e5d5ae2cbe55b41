"""Can a finished model be made cheaper? `moepp thin` against what a sceptic would do instead.

    python -m benchmarks.thin_proof OUT [--only TEXT] [--change section.key=value]
    python -m benchmarks.thin_proof OUT --table FILE [--change section.key=value]

A Mixtral of 8 experts and a Qwen3-MoE of 16, top-4, 3 layers and 64 wide, are trained
from scratch with transformers on code and prose of this machine, three seeds each. Each is then
thinned to half of its FFN experts by every recipe of `moepp thin`, with that command's own
configurations: the same data, steps and teacher. A result is OUT/FAMILY-SEED-RECIPE.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.fault_corpora import text_of
from moepp_megatron.file_names import METRICS_FILE
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.workbench.experiments.pilot.statistics import Estimate

# Of a source; a step is BATCH sequences.
SOURCE_STEPS = 600
LENGTH, BATCH, VOCABULARY = 128, 24, 1024
KINDS = {"code": ("python", "c"), "prose": ("manual", "rst")}
# Characters of a document; a tenth of the documents is held out.
PIECE, SPLIT = 20_000, "90,10,0"
PLACES = [(family, seed) for seed in (1, 2, 3) for family in ("mixtral", "qwen3")]
TOPK = 4
# Of whose runs `SETTINGS` was chosen; it proves nothing.
CHOSEN = ("mixtral", 1)
RECIPES = ("control", "budget", "topk", "zeda")
SHARE, STEPS, THIN_BATCH = 0.5, 100, 16
SETTINGS = (
    *("optimizer.lr=2e-3", "precision.dtype=fp32"),
    *(f"training.global_batch_size={THIN_BATCH}", f"training.micro_batch_size={THIN_BATCH}"),
    *(f"data.split='{SPLIT}'", "data.num_workers=0", "routing_guard=off"),
    *("training.eval_interval=50", "training.eval_iters=8", "training.log_interval=5"),
)


def prepared(out: Path) -> list[Path]:
    """The prepared folders, one for each kind of text, with one tokenizer."""
    from moepp_megatron.data.prepare import PrepareSettings, prepare

    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    files = {kind: folder / f"{kind}.jsonl" for kind in KINDS}
    for kind, file in files.items():
        if not file.exists():
            texts = [text_of(part).decode("utf-8", errors="replace") for part in KINDS[kind]]
            pieces = [text[at : at + PIECE] for text in texts for at in range(0, len(text), PIECE)]
            lines = [json.dumps({"text": piece}) for piece in pieces]
            write_atomic(file, "\n".join(lines).encode())
    both = PrepareSettings(vocab_size=VOCABULARY, workers=1)
    each = PrepareSettings(tokenizer=folder / "both" / "tokenizer.json", workers=1)
    wanted = {"both": (list(files.values()), both)} | {
        kind: ([file], each) for kind, file in files.items()
    }
    for name, (sources, settings) in wanted.items():
        if not (folder / name).exists():
            prepare([str(source) for source in sources], folder / name, settings)
    return [folder / kind for kind in KINDS]


def source(family: str, seed: int, out: Path) -> Path:
    """The folder of a source model, trained if it is not there."""
    folder = out / "sources" / f"{family}-{seed}"
    if (folder / "losses.json").exists():
        return folder
    import transformers

    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
        "initializer_range": 0.05,
        "router_aux_loss_coef": 0.02,
        "output_router_logits": True,
        "use_cache": False,
    }
    torch.manual_seed(seed)
    model: Any
    if family == "mixtral":
        own = {"num_local_experts": 8, "num_experts_per_tok": 4, "intermediate_size": 64}
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape, **own))
    else:
        own = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64}
        own |= {"intermediate_size": 64, "head_dim": 16, "norm_topk_prob": True}
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**shape, **own))
    model.set_experts_implementation("grouped_mm")
    losses = _train_source(model, _training_part(prepared(out), seed))
    model.save_pretrained(folder)
    tokenizer = out / "data" / "both" / "tokenizer.json"
    write_atomic(folder / "tokenizer.json", tokenizer.read_bytes())
    write_atomic(folder / "losses.json", json.dumps(losses).encode())
    return folder


def _training_part(folders: list[Path], seed: int) -> Any:
    from moepp_megatron.config.blends import Blend, Folder
    from moepp_megatron.data.datasets import build_datasets
    from moepp_megatron.data.tokenizer import Tokenizer

    blend = Blend("source", 0, tuple(Folder("source", folder) for folder in folders))
    tokenizer, samples = Tokenizer.load(folders[0]), (SOURCE_STEPS * BATCH, 0, 0)
    return build_datasets([blend], tokenizer, LENGTH, SPLIT, seed, samples)[0]


def _train_source(model: Any, data: Any) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warmup, steps = 30, SOURCE_STEPS
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warmup) * (0.52 + 0.48 * np.cos(np.pi * step / steps)),
    )
    losses = []
    for step in range(steps):
        rows = [data[step * BATCH + row] for row in range(BATCH)]
        tokens, labels = (
            torch.stack([torch.as_tensor(row[name]) for row in rows])
            for name in ("tokens", "labels")
        )
        output = model(input_ids=tokens, labels=labels, shift_labels=labels)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(round(float(output.loss.detach()), 4))
    return losses


@dataclass(frozen=True)
class Run:
    """A source, and what is done to it.

    Attributes:
        family: Of the source.
        seed: Of the source's weights and data; the data of the training have another order.
        recipe: Of `moepp thin`.
        changes: Settings over `SETTINGS`, of runs that choose.
    """

    family: str
    seed: int
    recipe: str
    changes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What identifies it among the results."""
        return " ".join((f"{self.family}-{self.seed}-{self.recipe}", *self.changes))


def measure(run: Run, out: Path) -> dict[str, Any]:
    """Validation losses by step and kind, FFN experts of a token by step, and the settings."""
    from moepp_megatron.interop.thin import ThinModels
    from moepp_megatron.observe.metrics import read_metrics
    from moepp_megatron.training.run import train
    from moepp_megatron.training.thin import ThinSettings

    folder = out / "thin" / " ".join((f"{run.family}-{run.seed}", *run.changes))
    changes = [*SETTINGS, f"training.seed={run.seed + 1000}", *run.changes]
    settings = ThinSettings(folder.resolve(), SHARE, prepared(out), steps=STEPS, overrides=changes)
    models = ThinModels.read(source(run.family, run.seed, out), settings.out, run.recipe)
    configs = settings.runs(run.recipe, models.model, models.start)
    del configs["model"]
    models.claim(SHARE)
    models.convert()
    valid: dict[int, dict[str, float]] = {}
    taken: dict[int, float] = {}
    done = 0
    for name, config in configs.items():
        is_start = name.endswith("-start")
        train(config, overwrite=True)
        for record in read_metrics(Path(config.run.dir) / METRICS_FILE):
            step = 0 if is_start else done + record.step
            taken[step] = round(record.ffn_fraction * config.moe.router_topk, 4)
            if record.valid_set_loss:
                losses = {kind: round(loss, 5) for kind, loss in record.valid_set_loss.items()}
                valid[step] = losses
        done += 0 if is_start else config.training.train_iters
    return {"run": run.name, "valid": valid, "ffn_per_token": taken}


def table(results: Iterable[Mapping[str, Any]], changes: Sequence[str] = ()) -> str:
    """Validation losses at the end, over the source's, the control's and trained topk's.

    Means over the sources that prove, with 95% t-intervals; FFN experts of the last ten steps. Of
    recipes that all these sources have, with `changes` over `SETTINGS`.
    """
    found = {result["run"]: result for result in results}
    proving = [place for place in PLACES if place != CHOSEN]

    def run(place: tuple[str, int], recipe: str) -> Mapping[str, Any]:
        return found.get(Run(*place, recipe, tuple(changes)).name, {})

    places = [place for place in proving if run(place, "control") and run(place, "topk")]
    recipes = [recipe for recipe in RECIPES if all(run(place, recipe) for place in places)]
    steps = max(int(step) for step in run(places[0], "control")["valid"])

    def losses(recipe: str, step: int) -> list[dict[str, float]]:
        return [run(place, recipe)["valid"][f"{step}"] for place in places]

    source = losses("control", 0)
    others = ("control", "topk")
    lines = [
        f"| {len(places)} sources | expert FLOP removed | {' | '.join(KINDS)} "
        f"| {' | '.join(f'both, over {other}' for other in others)} |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ("topk, not trained", *recipes):
        recipe, end = arm.split(",")[0], 0 if "," in arm else steps
        ours = losses(recipe, end)
        taken = [
            value
            for place in places
            for step, value in run(place, recipe)["ffn_per_token"].items()
            if int(step) > steps - 10 or end == 0
        ]
        cells = [_over([a[kind] for a in ours], [b[kind] for b in source]) for kind in KINDS]
        for other in others:
            theirs = losses(other, steps)
            cells.append(_over([*map(_mean, ours)], [*map(_mean, theirs)]))
        lines.append(f"| {arm} | {1 - np.mean(taken) / TOPK:.1%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(losses: Mapping[str, float]) -> float:
    return float(np.mean(list(losses.values())))


def _over(ours: Sequence[float], theirs: Sequence[float]) -> str:
    of = Estimate.of([a / b - 1 for a, b in zip(ours, theirs, strict=True)])
    return f"{of.mean:+.2%} +- {of.reach(0.025):.2%}"


def main() -> None:
    """Measure what is missing; or print the table of what is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--only", default="", help="runs whose names contain this")
    parser.add_argument("--change", action="append", default=[], help="a setting to try")
    parser.add_argument("--table", type=Path, help="collect results in this file, print the table")
    arguments = parser.parse_args()
    out: Path = arguments.out
    runs = [Run(*place, recipe, tuple(arguments.change)) for place in PLACES for recipe in RECIPES]
    for run in runs:
        file = out / f"{run.name}.json"
        if arguments.table or arguments.only not in run.name or file.exists():
            continue
        result = measure(run, out)
        write_atomic(file, json.dumps(result).encode())
        print(
            run.name, list(result["valid"].values())[-1], result["ffn_per_token"][STEPS], flush=True
        )
    if arguments.table:
        found = [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]
        if found:
            lines = "".join(f"{json.dumps(result)}\n" for result in found)
            write_atomic(arguments.table, lines.encode())
        found = [json.loads(line) for line in arguments.table.read_text().splitlines()]
        print(table(found, arguments.change))


if __name__ == "__main__":
    main()
