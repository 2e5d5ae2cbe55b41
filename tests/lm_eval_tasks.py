"""Tasks of lm-eval for tests, as files."""

import json

import yaml

SQUARE = {
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
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    ],
}


def write_task(folder, task, documents):
    """A task's file and, beside it, its documents; returns the file."""
    folder.mkdir(exist_ok=True)
    name = task["task"]
    content = {**task, "dataset_kwargs": {"data_files": {"test": [f"{name}.jsonl"]}}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    return folder / f"{name}.yaml"
