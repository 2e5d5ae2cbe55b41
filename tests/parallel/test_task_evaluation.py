"""Tasks of lm-eval on the running model: the scores of the export, and training as without them."""

import importlib.util
import json
import math
from contextlib import ExitStack
from unittest import mock

import pytest
import yaml

from tests.commands import moepp, succeeded
from tests.lm_eval_tasks import LAST, SQUARE, write_task
from tests.parallel.checkpoint_runs import run_trainer, trainer_settings
from tests.parallel.training_runs import EP2, PP2, TP2

# To import it takes seconds, which the ranks spend already.
if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed (pip install 'lm-eval')", allow_module_level=True)

DOCUMENTS = {
    "square": [
        {
            "question": f"Document {i}:",
            "choices": [f" words {i * i} and lines;", " lines", f" words{' and' * (i % 3 * 6)}"],
            "answer": i % 3,
        }
        for i in range(9)
    ],
    # Of lengths around the 32 tokens that the model reads at once.
    "last": [{"text": " and lines;" * (i + 1), "last": f"words {i}"} for i in range(9)],
}
LIMIT = {"capacity_factor": 1.0}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for task in (SQUARE, LAST):
        write_task(folder, task, DOCUMENTS[task["task"]])
    (folder / "_common.yaml").write_text("no: task\n")
    return folder


def settings_of(corpus, run, **sections):
    """Two steps with noise and the guard, saved and logged after the second."""
    training = {"train_iters": 2, "log_interval": 2}
    moe = {"num_ffn_experts": 4, "input_jitter_eps": 0.1, **sections.pop("moe", {})}
    return trainer_settings(
        corpus,
        run,
        training=training,
        moe=moe,
        model={"seq_length": 32},
        optimizer={"warmup_iters": 0},
        checkpoint={"save_interval": 2},
        **sections,
    )


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# What two runs of one configuration measure anew each time.
CLOCKS = ("step_time_s", "tokens_per_s", "mfu", "model_tflops", "cpu_utilization")


def course(run):
    clocks = (*CLOCKS, "host_memory_bytes", "task_score")
    return [{k: v for k, v in record.items() if k not in clocks} for record in records(run)]


def evaluated(raw):
    """A run whose ranks score one micro-batch at a time; rows at once, and signs of progress."""
    from moepp_megatron.features.tasks import part as task_evaluation
    from moepp_megatron.training.resilience.watchdog import Activity

    rows, phases = [], []
    score, enter = task_evaluation.score_sequences, Activity.enter

    def noted(stages, sequences):
        rows.append(len(sequences.input_ids))
        return score(stages, sequences)

    def entered(self, phase, step=None):
        phases.append(phase)
        enter(self, phase, step)

    with ExitStack() as stack:
        for owner, name, value in (
            (task_evaluation, "_MICRO_BATCHES", 1),
            (task_evaluation, "score_sequences", noted),
            (Activity, "enter", entered),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        run_trainer(raw)
    return rows, phases.count("evaluation")


def trained(ranks, tasks, corpus, folder, **sections):
    """The last scores of a run on two ranks, whose course is that of one without tasks."""
    ranks(2).run(run_trainer, settings_of(corpus, folder / "plain", **sections))
    evaluation = {"tasks": [str(tasks)], "interval": 1}
    raw = settings_of(corpus, folder / "run", evaluation=evaluation, **sections)
    told = ranks(2).run(evaluated, raw)
    assert told[0] == told[1]
    rows, signs = told[0]
    # 36 rows in each of two evaluations, of 32 tokens at most: no more at once than a step has.
    assert sum(rows) == 2 * (3 * 9 + 9)
    assert max(rows) <= 8
    assert signs >= len(rows)
    found = records(folder / "run")
    # Both steps are logged now; the one that was before is the same to the last bit.
    assert course(folder / "run")[1:] == course(folder / "plain")
    first, last = (record["task_score"] for record in found)
    assert set(first) == set(last) == {"square/acc", "last/perplexity"}
    # The test can fail: other weights have another perplexity.
    assert first["last/perplexity"] != pytest.approx(last["last/perplexity"], rel=1e-3)
    return last


def loglikelihood(model, tokens, count):
    """Of the last `count` tokens, by transformers."""
    import torch

    tokens = tokens[-33:]
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]])).logits[0]
    chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens[1:]).unsqueeze(1))
    return float(chosen[len(chosen) - count :].sum())


def offline(exported):
    """The scores, computed from the export without lm-eval and without this package's model."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    # The other implementations of experts know no fp64.
    options = {"trust_remote_code": True, "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(exported, **options).double().eval()
    tokenizer = Tokenizer.from_file(str(exported / "tokenizer.json"))

    def likelihood(context, continuation):
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


def export(run, target):
    from moepp_megatron.interop.convert import convert

    convert("mcore-to-hf", run, target)


@pytest.mark.parametrize(
    "layout",
    [
        {"parallel": TP2 | EP2, "moe": LIMIT},
        {"parallel": PP2, "moe": {"budget": {"target_ffn_per_token": 1.0}}},
    ],
    ids=["tensor and expert", "pipeline"],
)
def test_the_scores_are_those_of_the_export(ranks, tasks, corpus, tmp_path, layout):
    scores = trained(ranks, tasks, corpus, tmp_path, **layout)
    # The checkpoint of the last step, exported, scored by transformers in one process.
    ranks(1).run(export, str(tmp_path / "run"), str(tmp_path / "exported"))
    expected = offline(tmp_path / "exported")
    assert scores["square/acc"] == expected["square/acc"]
    # fp32 beside fp64.
    assert scores["last/perplexity"] == pytest.approx(expected["last/perplexity"], rel=1e-4)


def test_the_command(corpus, tmp_path):
    """One task that works and one that fails only with the model's own numbers."""
    write_task(tmp_path / "tasks", LAST, DOCUMENTS["last"])
    endless = {
        **LAST,
        "task": "endless",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    raw = settings_of(corpus, tmp_path / "run")
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(raw))
    evaluation = f"evaluation.tasks=[{tmp_path / 'tasks'}]"
    done = succeeded(moepp("train", config, evaluation))
    (record,) = records(tmp_path / "run")
    assert f"last/perplexity {record['task_score']['last/perplexity']:.4f} | " in done.stdout
    assert "Scores of tasks" in (tmp_path / "run/report.html").read_text()
    # One word of 600 tokens: exp(600 ln 320) is no float.
    write_task(tmp_path / "tasks", endless, [{"text": "lines;" * 600}])
    done = succeeded(moepp("train", config, evaluation, "--resume", "training.train_iters=3"))
    assert "OverflowError" in done.stderr
    assert "evaluation.tasks failed; training continues without these scores" in done.stderr
    assert [record.get("task_score") is None for record in records(tmp_path / "run")] == [
        False,
        True,
    ]


def failing_model(raw):
    """Return the error of a run whose model cannot be evaluated, and what other ranks are sent."""
    from moepp_megatron.features.tasks import part as task_evaluation

    sent = []
    send = task_evaluation.Agreement.from_first

    def noted(self, value):
        sent.append(type(value).__name__)
        return send(self, value)

    def out_of_memory(*_):
        sent.clear()
        raise MemoryError("no room for logits")

    with (
        mock.patch.object(task_evaluation.Agreement, "from_first", noted),
        mock.patch.object(task_evaluation, "score_sequences", out_of_memory),
        pytest.raises(MemoryError) as raised,
    ):
        run_trainer(raw)
    return str(raised.value), sent


def test_a_model_that_fails_ends_the_run_at_once(ranks, tasks, corpus, tmp_path):
    """Other ranks are in its collectives, where a message would wait for them."""
    raw = settings_of(corpus, tmp_path, evaluation={"tasks": [str(tasks)], "limit": 1})
    assert ranks(1).run(failing_model, raw) == [("no room for logits", [])]
