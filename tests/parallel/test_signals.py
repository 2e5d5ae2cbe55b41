"""A request to stop that reaches one rank stops all of them after the same step."""

import os
import signal
import threading

import pytest

from tests.parallel.ranks import RankError


def asked_at(step_of_signal, rank_of_signal, steps):
    import torch.distributed as dist

    from moepp_megatron.training.signals import StopRequest

    answers = []
    with StopRequest().listening() as stop:
        for step in range(steps):
            if step == step_of_signal and dist.get_rank() == rank_of_signal:
                os.kill(os.getpid(), signal.SIGTERM)
            answers.append(stop.agreed())
    return answers


def handlers_before_and_after():
    from moepp_megatron.runtime.stop_signals import STOP_SIGNALS
    from moepp_megatron.training.signals import StopRequest

    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopRequest().listening():
        during = [signal.getsignal(number) for number in STOP_SIGNALS]
    after = [signal.getsignal(number) for number in STOP_SIGNALS]
    return before == after != during


def asked_twice(same_request_s):
    from moepp_megatron.training import signals

    signals.SAME_REQUEST_S = same_request_s
    with signals.StopRequest().listening() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        return stop.agreed()


def asked_before_listening():
    """As under the launcher, which starts ranks with the signals held back."""
    from moepp_megatron.runtime.stop_signals import STOP_SIGNALS
    from moepp_megatron.training.signals import StopRequest

    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    # To this thread: the test's process has others, which do not hold it back.
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
    with StopRequest().listening() as stop:
        asked = stop.agreed()
    assert signal.pthread_sigmask(signal.SIG_SETMASK, before) >= set(STOP_SIGNALS)
    return asked


def test_all_ranks_stop_after_the_same_step(ranks):
    expected = [False, False, True, True]
    assert ranks(2).run(asked_at, 2, 1, 4) == [expected, expected]


def test_without_a_signal_nobody_stops(ranks):
    assert ranks(2).run(asked_at, -1, 0, 3) == [[False] * 3] * 2


def test_handlers_are_put_back(ranks):
    assert ranks(1).run(handlers_before_and_after) == [True]


def test_request_from_before_is_taken_up(ranks):
    assert ranks(1).run(asked_before_listening) == [True]


def test_one_request_may_come_several_ways(ranks):
    assert ranks(1).run(asked_twice, 3600.0) == [True]


def test_second_request_ends_the_process_at_once(ranks):
    with pytest.raises(RankError, match=str(128 + signal.SIGTERM)):
        ranks(1).run(asked_twice, -1.0)
