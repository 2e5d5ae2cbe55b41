"""Tasks of lm-eval on the running model: the scores of the export, and training as without them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moepp_megatron.data.tokenizer import Tokenizer
from tests.commands import moepp
from tests.faults.harness import write_config

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'lm-eval')")

CHOICE = {
    "task": "square",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "square.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
LAST = {
    "task": "last",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": ["last.jsonl"]}},
    "test_split": "test",
    "output_type": "loglikelihood",
    "doc_to_text": "{{text}}",
    "doc_to_target": " {{last}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
    ],
}
DOCUMENTS = {
    "square": [
        {
            "question": f"Document {i}:",
            "choices": [f" words {i * i} and lines;", " lines", f" words{' and' * (i % 3 * 6)}"],
            "answer": i % 3,
        }
        for i in range(30)
    ],
    # Of lengths around the 32 tokens that the model reads at once.
    "last": [{"text": " and lines;" * (i + 1), "last": f"words {i}"} for i in range(9)],
}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, task in (("square", CHOICE), ("last", LAST)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
        lines = [json.dumps(document) for document in DOCUMENTS[name]]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "_common.yaml").write_text("no: task\n")
    return folder


def configuration(path: Path, corpus: Path, ranks: int) -> Path:
    """Four steps with noise and the guard, saved after the second and the fourth."""
    write_config(
        path, corpus, path.parent / "run", ranks, save_interval=2, train_iters=4, log_interval=2
    )
    content = yaml.safe_load(path.read_text())
    content["moe"]["input_jitter_eps"] = 0.1
    content["checkpoint"]["async_save"] = False
    path.write_text(yaml.safe_dump(content))
    return path


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# What two runs of one configuration measure anew each time.
CLOCKS = ("step_time_s", "tokens_per_s", "mfu", "model_tflops", "cpu_utilization")


def course(run: Path) -> list[dict[str, Any]]:
    clocks = (*CLOCKS, "host_memory_bytes", "task_score")
    return [{k: v for k, v in record.items() if k not in clocks} for record in records(run)]


def loglikelihood(model: Any, tokens: list[int], count: int) -> float:
    """Of the last `count` tokens, by transformers."""
    import torch

    tokens = tokens[-33:]
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]])).logits[0].double()
    chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens[1:]).unsqueeze(1))
    return float(chosen[len(chosen) - count :].sum())


def offline(exported: Path) -> dict[str, float]:
    """The scores, computed from the export without lm-eval and without this package's model."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
    tokenizer = Tokenizer.from_file(str(exported / "tokenizer.json"))

    def likelihood(context: str, continuation: str) -> float:
        whole, before = (tokenizer.encode(t).ids for t in (context + continuation, context))
        return loglikelihood(model, whole, len(whole) - len(before))

    right = []
    for document in DOCUMENTS["square"]:
        found = [likelihood(document["question"], choice) for choice in document["choices"]]
        right.append(found.index(max(found)) == document["answer"])
    sums = [likelihood(each["text"], f" {each['last']}") for each in DOCUMENTS["last"]]
    return {
        "square/acc": sum(right) / len(right),
        "last/perplexity": math.exp(-sum(sums) / len(sums)),
    }


ALONE = "parallel.expert_model_parallel_size=1"
LIMIT = "moe.capacity_factor=1.0"


def trained(config: Path, tasks: Path, *words: str) -> list[dict[str, Any]]:
    """The records of a run on two ranks with tasks, whose course is that of one without them."""
    folder = config.parent
    plain = moepp("train", config, *words, f"run.dir={folder / 'plain'}", "--nproc", 2)
    assert plain.returncode == 0, plain.stderr
    evaluation = [f"evaluation.tasks=[{tasks}]", "evaluation.interval=1"]
    done = moepp("train", config, *words, *evaluation, "--nproc", 2)
    assert done.returncode == 0, done.stderr
    found = records(folder / "run")
    # All steps are logged now; those that were before are the same to the last bit.
    assert course(folder / "run")[1::2] == course(folder / "plain")
    assert [set(record["task_score"]) for record in found] == [
        {"square/acc", "last/perplexity"}
    ] * 4
    last = found[-1]["task_score"]
    assert f" {last['square/acc']:.4f} | " in done.stdout
    # The test can fail: other weights have another perplexity.
    assert found[0]["task_score"]["last/perplexity"] != pytest.approx(
        last["last/perplexity"], rel=1e-3
    )
    return found


@pytest.mark.parametrize(
    "layout",
    [
        [LIMIT],
        [ALONE, LIMIT, "parallel.pipeline_model_parallel_size=2"],
        [
            ALONE,
            "moe.budget.target_ffn_per_token=1.0",
            "parallel.tensor_model_parallel_size=2",
            "parallel.sequence_parallel=true",
        ],
    ],
    ids=["expert", "pipeline", "tensor"],
)
def test_the_scores_are_those_of_the_export(
    tasks: Path, corpus: Path, tmp_path: Path, layout: list[str]
) -> None:
    config = configuration(tmp_path / "c.yaml", corpus, 2)
    scores = trained(config, tasks, *layout)[-1]["task_score"]
    # The checkpoint of the last step, exported, scored by transformers in one process.
    run, exported = tmp_path / "run", tmp_path / "exported"
    converted = moepp("convert", "mcore-to-hf", run, exported)
    assert converted.returncode == 0, converted.stderr
    expected = offline(exported)
    assert scores["square/acc"] == expected["square/acc"]
    # fp32 in another order of sums.
    assert scores["last/perplexity"] == pytest.approx(expected["last/perplexity"], rel=1e-4)
    report = moepp("report", run)
    assert report.returncode == 0, report.stderr
    assert "Scores of tasks" in (run / "report.html").read_text()


def test_the_vanilla_layer_has_no_limit_either(tasks: Path, corpus: Path, tmp_path: Path) -> None:
    kinds = ("zero", "copy", "constant")
    none = [f"moe.num_{kind}_experts=0" for kind in kinds]
    config = configuration(tmp_path / "c.yaml", corpus, 2)
    vanilla = [*none, "moe.gating_residual=false", LIMIT, "moe.balance_coeff=0.0"]
    scores = trained(config, tasks, *vanilla)[-1]["task_score"]
    tokenizer = Tokenizer.load(corpus)
    rows, counts = [], []
    for document in DOCUMENTS["last"]:
        before, whole = document["text"], f"{document['text']} {document['last']}"
        rows.append(tokenizer.encode(whole)[-33:])
        counts.append(len(tokenizer.encode(whole)) - len(tokenizer.encode(before)))
    padded = [row + [0] * (33 - len(row)) for row in rows]
    np.savez(tmp_path / "t.npz", input_ids=np.array(padded))
    words = ("--tokens", tmp_path / "t.npz", "--out", tmp_path / "s.npz")
    done = moepp("score", tmp_path / "run", *words)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "s.npz") as file:
        logprobs = file["token_logprobs"]
    sums = [
        values[len(row) - 1 - count : len(row) - 1].sum()
        for values, row, count in zip(logprobs, rows, counts, strict=True)
    ]
    expected = math.exp(-sum(sums) / len(sums))
    # As above.
    assert scores["last/perplexity"] == pytest.approx(expected, rel=1e-4)


def refusal(config: Path, *words: object) -> str:
    done = moepp("train", config, *words)
    assert done.returncode == 2, done.stderr
    return done.stderr.splitlines()[-1]


def test_mistakes(tasks: Path, corpus: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path / "c.yaml", corpus, 1)
    missing = f"evaluation.tasks=[{tasks / 'none.yaml'}]"
    assert "none.yaml) cannot be read (FileNotFoundError" in refusal(config, missing)
    file = tasks / "square.yaml"
    named = f"evaluation.tasks=[{file}]"
    for changes, message in (
        ({"task": ["a", "b"]}, "must be a single task, with its name as task:"),
        ({"dataset_path": "EleutherAI/lambada_openai"}, "must have dataset_path: json"),
        ({"output_type": "generate_until"}, "not generate_until; use multiple_choice"),
        ({"dataset_kwargs": {}}, "must name its documents by split"),
        (
            {"dataset_kwargs": {"data_files": {"test": "no.jsonl"}}},
            "names documents that cannot be read (FileNotFoundError",
        ),
        ({"doc_to_text": "{{question"}, "is no task that lm-eval can build"),
    ):
        file.write_text(yaml.safe_dump(CHOICE | changes))
        assert message in refusal(config, named)
    file.write_text(yaml.safe_dump(CHOICE))
    (tasks / "square.jsonl").write_text('{"question": 1}\n[]\n')
    assert "square.jsonl:2; correct that line" in refusal(config, named)
    long = {"question": "Document 1:", "choices": [" a", " and lines" * 40], "answer": 0}
    (tasks / "square.jsonl").write_text(json.dumps(long))
    said = refusal(config, named)
    assert "(square) must be possible to evaluate, which fails (ValueError: a continuation" in said
    assert "does not fit into model.seq_length (32)); correct the task" in said
    assert "must have a name of its own" in refusal(
        config, f"evaluation.tasks=[{tasks / 'last.yaml'}, {tasks / 'last.yaml'}]"
    )
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_evaluated(corpus: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path / "c.yaml", corpus, 1)
    asked = ("evaluation.tasks=[t.yaml]", "training.cuda_graphs=[attn]")
    assert "must have training.cuda_graphs (['attn']) []" in refusal(config, *asked)
