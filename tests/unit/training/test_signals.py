"""A process that trains alone answers Ctrl-C itself."""

import os
import signal

import pytest

from moepp_megatron.runtime.stop_signals import STOP_SIGNALS
from moepp_megatron.training import signals
from moepp_megatron.training.signals import StopRequest


@pytest.mark.parametrize(
    ("rank", "number", "answers"),
    [
        (None, signal.SIGINT, 1),
        # Its launcher answers for all ranks.
        ("0", signal.SIGINT, 0),
        # Nobody waits for an answer to it.
        *((None, number, 0) for number in STOP_SIGNALS if number != signal.SIGINT),
    ],
)
def test_the_first_ctrl_c_is_answered_at_once(rank, number, answers, monkeypatch, capfd):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    if rank is not None:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "1"}.items():
            monkeypatch.setenv(name, value)
    with StopRequest().listening():
        os.kill(os.getpid(), number)
        # Within this time it is the same Ctrl-C, which `timeout -s INT` sends twice.
        os.kill(os.getpid(), number)
    assert capfd.readouterr().err.count("stopping after this step") == answers


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR2])
def test_what_comes_again_by_itself_is_no_impatience(number, monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(signals, "SAME_REQUEST_S", -1.0)
    with StopRequest().listening():
        for _ in range(2):
            os.kill(os.getpid(), number)
    assert ended == ([128 + number] if number == signal.SIGUSR2 else [])
