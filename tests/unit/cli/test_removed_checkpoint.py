"""Commands that read a running run's newest checkpoint take the next one when it is removed."""

import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import typer

from moepp_megatron.cli import generate, inspect, score
from moepp_megatron.interop.generate import GenerateRequest
from moepp_megatron.interop.score import ScoreRequest
from moepp_megatron.tools.inspection.request import InspectRequest
from moepp_megatron.training.checkpoint import find


@pytest.mark.parametrize(
    ("module", "request_kind", "options"),
    [
        (generate, GenerateRequest, {"prompt": ["a"]}),
        (score, ScoreRequest, {}),
        (inspect, InspectRequest, {"text": "a.txt"}),
    ],
    ids=lambda x: x.__name__ if hasattr(x, "__name__") else "",
)
def test_ranks_are_started_with_the_next_one(module, request_kind, options, tmp_path, monkeypatch):
    first, second = tmp_path / "step_1", tmp_path / "step_2"
    first.mkdir()
    second.mkdir()
    scoring = SimpleNamespace(notices=[])
    request = SimpleNamespace(notices=[], scoring=scoring, max_new_tokens=1)
    monkeypatch.setattr(request_kind, "read", Mock(return_value=request))
    monkeypatch.setattr(find, "find_checkpoint", Mock(side_effect=[first, second]))
    started = []

    def start(_, arguments):
        started.extend(word for word in arguments if word in (str(first), str(second)))
        if first.exists():
            shutil.rmtree(first)
            raise typer.Exit(1)

    monkeypatch.setattr(module, "start_ranks", start)
    command = getattr(module, module.__name__.rpartition(".")[2])
    command(tmp_path, nproc=2, **options)
    assert started == [str(first), str(second)]
