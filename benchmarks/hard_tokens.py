"""Do hard tokens get more FFN experts? The ladder's models, token by token.

    python -m benchmarks.hard_tokens OUT [--table FILE]

OUT is the ladder's folder, after its stage `tune`. A token is hard by its loss under a teacher, a
vanilla model whose seed no other model has. The result is the mean of FFN experts, summed over all
MoE layers, of the hardest quarter of the tokens less that of the easiest, for two losses: the
token's own, and the next token's, which the model predicts at that place. `all` compares all
tokens, `id` those of one id (averaged over ids), and `context` those of one id in one corpus and
quarter of the window. Nulls shuffle the losses among what is compared; for `all` also among the
tokens of an id, which keeps what ids explain. Intervals are 95%, over sequences. A model leaves
OUT/NAME.npz and is not trained again; `--table` writes a line a model.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ladder import Results, tuned
from benchmarks.ladder_run import BATCH, CHANGES, KINDS, LENGTH, SIZES, K, Run, sequences, train
from moepp_megatron.runtime import cpu_support, distributed
from moepp_megatron.runtime.atomic import whole_file, write_atomic
from moepp_megatron.runtime.rank import RankEnvironment

# Sequences of each corpus, from the tenth that is held out; shuffles; tokens that an id must have.
SEQUENCES, SHUFFLES, LEAST = 64, 8, 8
SIZE, TIGHT = "M", "share 0.3"
CHANGES[TIGHT] = {"moe": {"budget": {"target_ffn_per_token": 0.3 * K}}}
CORPORA = [(kind, corpus) for kind, corpora in KINDS["A"].items() for corpus in corpora]


def planned(results: Results) -> list[Run]:
    """The teacher, and a model of each arm and seed."""
    arms = [(arm, "steps") for arm in ("paper", "selected", "no residual", "identity")]
    models = [(seed, *arm) for seed in (1, 2, 3) for arm in (*arms, ("paper", TIGHT))]
    return [
        Run("hard", arm, SIZE, seed, SIZES[SIZE].steps, *tuned(arm, results), what=what)
        for seed, arm, what in [(9, "vanilla", "steps"), *models]
    ]


def asked(out: Path) -> np.ndarray:
    """[b, s] token ids, corpus by corpus."""
    texts = [sequences(out, (corpus,), 7, True) for _, corpus in CORPORA]
    return np.stack([text[i]["tokens"].numpy() for text in texts for i in range(SEQUENCES)])


def measure(run: Run, out: Path) -> dict[str, np.ndarray]:
    """Train; `losses` [b, s - 1] of each token after the first, `ffn` [b, s] unless vanilla."""
    from moepp_megatron.model.stage import evaluation_stages
    from moepp_megatron.tools.inspection.record import recorded_routing
    from moepp_megatron.training.token_scores import Sequences, score_sequences

    model, config, *_ = train(run, out)
    ids, stages = asked(out), evaluation_stages(model.models, config)
    with recorded_routing([] if run.arm == "vanilla" else stages) as passes:
        scores = score_sequences(stages, Sequences(ids, LENGTH, micro_batch_size=BATCH))
    assert scores is not None
    found = {"losses": -scores["token_logprobs"][:, :-1].astype(np.float32)}
    if passes:
        layers = [np.stack([one.selected for one in each]) for each in passes.values()]
        ffn = (np.stack(layers) < config.moe.num_ffn_experts).sum(axis=(0, 3)).astype(np.int8)
        # A micro-batch's tokens come place by place.
        found["ffn"] = ffn.reshape(-1, LENGTH, BATCH).swapaxes(1, 2).reshape(ids.shape)
    return found


def contrast(loss: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """[N] 1 for the hardest quarter of each stratum's tokens, -1 for the easiest, else 0."""
    order = np.lexsort((loss, strata))
    _, start, count = np.unique(strata[order], return_index=True, return_counts=True)
    place = (np.arange(len(loss)) - np.repeat(start, count) + 0.5) / np.repeat(count, count)
    quarter = (place > 0.75).astype(int) - (place < 0.25)
    signs = np.empty(len(loss), int)
    signs[order] = np.where(np.repeat(count, count) < LEAST, 0, quarter)
    return signs


def shuffled(loss: np.ndarray, strata: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    """The losses of each stratum in another order."""
    moved = np.empty_like(loss)
    moved[np.argsort(strata, kind="stable")] = loss[np.lexsort((chance.random(len(loss)), strata))]
    return moved


def answer(
    ffn: np.ndarray, loss: np.ndarray, strata: np.ndarray, ids: np.ndarray, rows: np.ndarray
) -> dict[str, Any]:
    """A gap, its interval over sequences and its nulls; [N] by token, `rows` is its sequence."""
    chance, signs = np.random.default_rng(0), contrast(loss, strata)
    (_, of), (each_row, rows) = (np.unique(a, return_inverse=True) for a in (strata, rows))
    # A stratum has as many hard tokens as easy ones, so its mean changes no gap.
    centred = ffn - (np.bincount(of, ffn) / np.bincount(of))[of]
    drawn = chance.integers(len(each_row), size=(1000, len(each_row)))
    sums, counts = (np.bincount(rows, each)[drawn] for each in (centred * signs, signs > 0))
    ends = {"interval": sums.sum(axis=1) / counts.sum(axis=1)}
    nulls_of = {"shuffled": strata} | ({} if strata.any() else {"shuffled in ids": ids})
    for name, among in nulls_of.items():
        nulls = (contrast(shuffled(loss, among, chance), strata) for _ in range(SHUFFLES))
        ends[name] = np.array([centred @ null for null in nulls]) / (signs > 0).sum()
    found = {name: np.quantile(a, (0.025, 0.975)).round(3).tolist() for name, a in ends.items()}
    return {"gap": round(float(centred @ signs / (signs > 0).sum()), 3), **found}


def answers(ffn: np.ndarray, losses: np.ndarray, ids: np.ndarray) -> dict[str, Any]:
    """Answers at places with both losses, by loss, text and comparison; `losses` [b, s - 1]."""
    row, place = np.indices(ids[:, 1:-1].shape)
    ffn, corpus, inner = ffn[:, 1:-1], row // SEQUENCES, ids[:, 1:-1]
    context = (inner * len(CORPORA) + corpus) * 4 + place * 4 // LENGTH
    fixed = {"all": np.zeros_like(inner), "id": inner + 1, "context": context + 1}
    asked_of = {"own": losses[:, :-1], "next": losses[:, 1:]}
    of_corpus, found = np.array([kind for kind, _ in CORPORA]), {}
    for kind, which, name in product(("all", *KINDS["A"]), asked_of, fixed):
        there = np.full_like(row, True, bool) if kind == "all" else of_corpus[corpus] == kind
        arrays = (ffn, asked_of[which], fixed[name], inner, row)
        found[f"{which}, {kind}, {name}"] = answer(*(each[there] for each in arrays))
    return found


def table(out: Path, runs: list[Run]) -> str:
    """A line a model that is there."""
    ids, lines = asked(out), []
    losses = np.load(out / f"{runs[0].name}.npz")["losses"]
    for run in runs[1:]:
        if (out / f"{run.name}.npz").exists():
            ffn = np.load(out / f"{run.name}.npz")["ffn"]
            row = {"run": asdict(run), "teacher": runs[0].name, "ffn": round(ffn.mean(), 3)}
            lines.append(json.dumps({**row, **answers(ffn, losses, ids)}) + "\n")
    return "".join(lines)


def main() -> None:
    """Train what is missing, or compute."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="the ladder's folder")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write a line a model")
    arguments = parser.parse_args()
    out, runs = arguments.out, planned(Results(arguments.out))
    if arguments.table:
        write_atomic(arguments.table, table(out, runs).encode())
        return
    cpu_support.install()
    distributed.start(RankEnvironment())
    for run in runs:
        path = out / f"{run.name}.npz"
        if not path.exists():
            with whole_file(path) as temporary, temporary.open("wb") as stream:
                np.savez_compressed(stream, **measure(run, out))
    distributed.stop()


if __name__ == "__main__":
    main()
