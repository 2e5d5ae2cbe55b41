"""Tasks of lm-eval from local files, and the model that lm-eval asks. Needs lm-eval."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

# lm-eval and what it imports ask the Hugging Face hub otherwise, on their import already.
for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
    os.environ.setdefault(_name, "1")

import datasets  # noqa: E402
import numpy as np  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.evaluator import evaluate  # noqa: E402
from lm_eval.tasks.manager import load_yaml  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

from moepp_megatron.config import Config, ConfigError  # noqa: E402
from moepp_megatron.config.json_file import parse_json  # noqa: E402
from moepp_megatron.data.tokenizer import Tokenizer  # noqa: E402

# Of each row of tokens, log-probability and whether it is the likeliest of each after the first.
Scorer = Callable[[Sequence[Sequence[int]]], list[tuple[np.ndarray, np.ndarray]]]
Tasks = dict[str, ConfigurableTask]
SETTING = "evaluation.tasks"
# Few-shot examples are drawn as `lm_eval run` draws them by default.
_FEWSHOT_SEED = 1234
_GENERATES = "generate_until"
# Its warnings are advice for its own command line.
logging.getLogger("lm_eval").setLevel(logging.ERROR)


def load_tasks(config: Config) -> Tasks:
    """Return the tasks of `evaluation.tasks` by name, with their documents read.

    Raise ConfigError if a file is missing, is no task, or is not of local JSONL.
    """
    tasks: Tasks = {}
    for file in _files(config.evaluation.tasks):
        task = _load(file)
        name = task.config.task
        if name in tasks:
            raise _refusal(file, f"must have a name of its own, and {name} is taken", "rename it")
        tasks[name] = task
    return tasks


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        files = [each for each in sorted(path.glob("*.yaml")) if not each.name.startswith("_")]
        if not files:
            raise _refusal(path, "must hold YAML files of tasks, and holds none", "name another")
        yield from files


def _load(file: Path) -> ConfigurableTask:
    try:
        content = load_yaml(file)
    except Exception as error:  # whatever a file of that kind, or code that it names, raises
        raise _refusal(file, f"cannot be read ({_line(error)})", "correct it") from error
    _check(file, content)

    def read(**given: Any) -> datasets.DatasetDict:
        return _documents(file, given.get("data_files"))

    try:
        task = ConfigurableTask(config={**content, "custom_dataset": read})
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    except ConfigError:
        raise
    except Exception as error:  # as above
        raise _refusal(
            file, f"is no task that lm-eval can build ({_line(error)})", "correct it"
        ) from error
    return task


def _check(file: Path, content: dict[str, Any]) -> None:
    if not isinstance(content.get("task"), str):
        rule = "must be a single task, with its name as task: (no group, tag or list)"
        raise _refusal(file, rule, "name the tasks of a group one by one")
    if content.get("dataset_path") != "json":
        raise _refusal(
            file,
            f"must have dataset_path: json (and has {content.get('dataset_path')!r}), since "
            "documents are read from local files",
            "write them to JSONL and name it under dataset_kwargs: {data_files: {test: FILE}}",
        )
    if content.get("output_type", _GENERATES) == _GENERATES:
        raise _refusal(
            file,
            f"must have an output_type that needs no text from the model, not {_GENERATES}",
            "use multiple_choice, loglikelihood or loglikelihood_rolling, or export the model and "
            "use lm_eval run",
        )


def _documents(file: Path, data_files: Any) -> datasets.DatasetDict:
    """The documents by split; relative paths are relative to the task's file."""
    if not isinstance(data_files, dict) or not data_files:
        rule = "must name its documents by split"
        raise _refusal(file, rule, "write dataset_kwargs: {data_files: {test: FILE.jsonl}}")
    splits = {}
    for split, names in data_files.items():
        rows: list[Any] = []
        for name in names if isinstance(names, list) else [names]:
            rows += _rows(file, file.parent / str(name))
        if not rows:
            raise _refusal(file, f"must have documents in split {split}", "add some")
        splits[split] = datasets.Dataset.from_list(rows)
    return datasets.DatasetDict(splits)


def _rows(file: Path, path: Path) -> list[Any]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        rule = f"names documents that cannot be read ({_line(error)})"
        raise _refusal(file, rule, "correct it") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line) if line.strip() else None
        except ValueError:
            row = line
        if row is not None and not isinstance(row, dict):
            rule = f"must have a JSON object on each line of its documents, unlike {path}:{number}"
            raise _refusal(file, rule, "correct that line")
        rows += [] if row is None else [row]
    return rows


def _refusal(file: Path, rule: str, remedy: str) -> ConfigError:
    return ConfigError(f"{SETTING} ({file}) {rule}; {remedy}")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def run_tasks(
    tasks: Tasks, score: Scorer, tokenizer: Tokenizer, max_length: int, limit: int | None
) -> dict[str, float]:
    """Return scores by `TASK/METRIC`, or `TASK/METRIC/FILTER` where a task has filters.

    `score` gets rows of at most `max_length` + 1 tokens, of which the model reads `max_length` at
    once. `limit` is the number of documents of each task; None for all.
    """
    model = _ScoredModel(score, tokenizer, max_length)
    # lm-eval draws progress bars.
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        output = evaluate(
            model, {"tasks": tasks}, limit=limit, bootstrap_iters=0, log_samples=False
        )
    return {
        "/".join([name, *key.removesuffix(",none").split(",")]): float(value)
        for name, values in output["results"].items()
        for key, value in values.items()
        if "," in key and "_stderr," not in key
    }


def try_tasks(tasks: Tasks, tokenizer: Tokenizer, max_length: int, limit: int | None) -> None:
    """Evaluate with scores of 0; raise ConfigError for a task that cannot be evaluated."""

    def score(rows: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(np.zeros(len(row) - 1), np.zeros(len(row) - 1, dtype=bool)) for row in rows]

    try:
        run_tasks(tasks, score, tokenizer, max_length, limit)
    except Exception as error:  # whatever lm-eval, or code that a task names, raises
        raise ConfigError(
            f"{SETTING} ({', '.join(tasks)}) must be possible to evaluate, which fails "
            f"({_line(error)}); correct the task"
        ) from error


class _ScoredModel(TemplateLM):
    """lm-eval's model: tokens and their log-probabilities. One process asks for all ranks."""

    def __init__(self, score: Scorer, tokenizer: Tokenizer, max_length: int) -> None:
        super().__init__()
        self._score, self._tokenizer, self._max_length = score, tokenizer, max_length

    @property
    def eot_token_id(self) -> int:
        """The token that is put before a text without context."""
        return self._tokenizer.eod

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens; nothing is added."""
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding gives it."""
        # A context that is too long loses its beginning, as in lm-eval's own model for
        # transformers.
        most = self._max_length + 1
        rows = [(context + continuation)[-most:] for _, context, continuation in requests]
        answers = []
        for (_, _, wanted), (logprobs, likeliest) in zip(requests, self._score(rows), strict=True):
            if len(wanted) > self._max_length:
                raise ValueError(
                    f"a continuation of {len(wanted)} tokens does not fit into model.seq_length "
                    f"({self._max_length})"
                )
            begin = len(logprobs) - len(wanted)
            answers.append((float(logprobs[begin:].sum()), bool(likeliest[begin:].all())))
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows that begin with a token of the one before."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            parts = get_rolling_token_windows(tokens, self.prefix_token_id, self._max_length, 1)
            for context, continuation in map(make_disjoint_window, parts):
                windows.append((None, context, continuation))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += logprob
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Unsupported: refused on loading."""
        raise NotImplementedError(_GENERATES)
