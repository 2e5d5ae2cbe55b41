"""Errors in a task are found before a run begins."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import yaml

from tests.lm_eval_tasks import LAST, SQUARE, write_task
from tests.refusals import config_error
from tests.unit.training.conftest import config_of

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed (pip install 'lm-eval')", allow_module_level=True)

# A token for each character.
TOKENIZER = SimpleNamespace(encode=lambda text: list(map(ord, text)), eod=0)
DOCUMENT = {"question": "1?", "choices": [" a", " b"], "answer": 0}


def refusal(*files):
    """Return the message about tasks, which is one line."""
    from moepp_megatron.features.tasks.lm_eval_tasks import load_tasks, try_tasks

    config = config_of(evaluation={"tasks": list(map(str, files))})
    with config_error("^.*$") as refused:
        try_tasks(load_tasks(config), TOKENIZER, config.model.seq_length, None)
    return str(refused.value)


def test_a_task_that_is_right(tmp_path):
    from moepp_megatron.features.tasks.lm_eval_tasks import load_tasks, try_tasks

    write_task(tmp_path, SQUARE, [DOCUMENT])
    (tmp_path / "_common.yaml").write_text("no: task\n")
    tasks = load_tasks(config_of(evaluation={"tasks": [str(tmp_path)]}))
    assert list(tasks) == ["square"]
    try_tasks(tasks, TOKENIZER, 16, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": ["a", "b"]}, "must be a single task, with its name as task:"),
        ({"dataset_path": "EleutherAI/lambada_openai"}, "must have dataset_path: json"),
        ({"output_type": "generate_until"}, "not generate_until; use multiple_choice"),
        ({"dataset_kwargs": {}}, "must name its documents by split"),
        (
            {"dataset_kwargs": {"data_files": {"test": "no.jsonl"}}},
            "names documents that cannot be read (FileNotFoundError",
        ),
        ({"doc_to_text": "{{question"}, "is no task that lm-eval can build"),
    ],
)
def test_mistakes(tmp_path, changes, message):
    file = write_task(tmp_path, SQUARE, [DOCUMENT])
    file.write_text(yaml.safe_dump(SQUARE | changes))
    assert message in refusal(file)


def test_mistakes_in_documents_and_names(tmp_path):
    missing = tmp_path / "none.yaml"
    assert "none.yaml) cannot be read (FileNotFoundError" in refusal(missing)
    file = write_task(tmp_path, SQUARE, [DOCUMENT])
    documents = tmp_path / "square.jsonl"
    documents.write_text('{"question": 1}\n[]\n')
    assert "square.jsonl:2; correct that line" in refusal(file)
    documents.write_text("\n")
    assert "must have documents in split test; add some" in refusal(file)
    documents.write_text(json.dumps(DOCUMENT | {"choices": [" a", " b" * 9]}))
    said = refusal(file)
    assert "(square) must be possible to evaluate, which fails (ValueError: a continuation" in said
    assert "of 18 tokens does not fit into model.seq_length (16)); correct the task" in said
    last = write_task(tmp_path, LAST, [{"text": "a", "last": "b"}])
    assert "must have a name of its own" in refusal(last, last)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "must hold YAML files of tasks, and holds none" in refusal(empty)
