"""The rank pools themselves: results, reports of failures, recovery, isolation between calls."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.parallel.ranks import RankError, RankPool, RankPools

pytestmark = pytest.mark.parallel


# ---- functions that run on the ranks -----------------------------------------------------


def describe():
    import torch.distributed as dist

    return f"{dist.get_rank()}/{dist.get_world_size()}"


def fail_on(rank, message):
    import torch.distributed as dist

    if dist.get_rank() == rank:
        print("a word before the failure")
        raise ValueError(message)
    dist.barrier()


def hang_on(rank):
    import torch.distributed as dist

    if dist.get_rank() == rank:
        time.sleep(600)
    dist.barrier()


def write_process_id_and_hang(folder):
    import torch.distributed as dist

    unfinished = Path(folder) / f"{dist.get_rank()}.new"
    unfinished.write_text(str(os.getpid()))
    unfinished.rename(Path(folder) / f"{dist.get_rank()}.pid")
    time.sleep(600)


def segfault_on(rank):
    import ctypes

    import torch.distributed as dist

    if dist.get_rank() == rank:
        ctypes.string_at(0)
    dist.barrier()


def process_id():
    return os.getpid()


def leave_state_behind():
    """Everything that a Megatron test usually leaves, and the draws of its generators."""
    import torch
    from megatron.core import num_microbatches_calculator, parallel_state

    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    num_microbatches_calculator.init_num_microbatches_calculator(0, None, 4, 1, 1)
    torch.set_default_dtype(torch.bfloat16)
    torch.set_grad_enabled(False)
    return torch.rand(3, dtype=torch.float32).tolist()


def state_found():
    import torch
    import torch.distributed as dist
    from megatron.core import num_microbatches_calculator, parallel_state

    return {
        "parallel_state": parallel_state.is_initialized(),
        "calculator": num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is not None,
        "dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "groups": len(dist.distributed_c10d._world.pg_map),
        "threads": torch.get_num_threads(),
        "visible_gpus": os.environ["CUDA_VISIBLE_DEVICES"],
    }


# ---- tests -------------------------------------------------------------------------------


def test_exception_names_rank_and_shows_its_traceback_and_output(ranks):
    started = time.monotonic()
    with pytest.raises(RankError) as caught:
        ranks(2).run(fail_on, 1, "seven is not even")
    message = str(caught.value)
    assert "test_ranks.fail_on failed on 1 of 2 ranks" in message
    assert "---- rank 1: Traceback (most recent call last)" in message
    assert "in fail_on\n    raise ValueError(message)\nValueError: seven is not even" in message
    assert "a word before the failure" in message
    # Rank 0 was waiting in the barrier: its stack says so, and nobody waited for the timeout.
    assert "---- rank 0, output, and stack when ended:" in message
    assert "in barrier" in message
    assert list(caught.value.reasons) == [1]
    assert time.monotonic() - started < 60
    assert ranks(2).run(describe) == ["0/2", "1/2"]


def test_timeout_shows_every_stack_and_the_next_call_works(ranks):
    before = ranks(2).run(process_id)
    with pytest.raises(RankError, match="still at work after 5 s") as caught:
        ranks(2).run(hang_on, 1, timeout=5)
    message = str(caught.value)
    assert message.count("in hang_on") == 2
    assert sorted(caught.value.reasons) == [0, 1]
    after = ranks(2).run(process_id)
    assert not set(before) & set(after)
    for pid in before:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.faults
def test_segmentation_fault_is_reported_with_its_stack(ranks):
    with pytest.raises(RankError, match="rank 0: killed by SIGSEGV") as caught:
        ranks(2).run(segfault_on, 0)
    assert "in segfault_on" in str(caught.value)


@pytest.mark.faults
def test_ranks_end_with_the_process_that_started_them(tmp_path):
    script = tmp_path / "starts_ranks.py"
    script.write_text(
        "from tests.parallel import ranks, test_ranks\n"
        "if __name__ == '__main__':\n"
        f"    ranks.RankPool(2).run(test_ranks.write_process_id_and_hang, {str(tmp_path)!r})\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen([sys.executable, str(script)], env=environment) as starter:
        while len(list(tmp_path.glob("*.pid"))) < 2 and starter.poll() is None:
            time.sleep(0.05)
        starter.kill()
    pids = [int(file.read_text()) for file in tmp_path.glob("*.pid")]
    assert len(pids) == 2
    for pid in pids:
        while _is_running(pid):  # ended by pytest's timeout if it never is
            time.sleep(0.05)


def _is_running(pid):
    try:
        # The state follows the command's closing bracket; a zombie only waits to be collected.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.faults
def test_ranks_that_died_between_calls_are_replaced(ranks):
    for pid in ranks(2).run(process_id):
        os.kill(pid, signal.SIGKILL)
    while ranks(2).is_alive:  # ended by pytest's timeout if it never is
        time.sleep(0.01)
    assert ranks(2).run(describe) == ["0/2", "1/2"]


def test_nothing_leaks_into_the_next_call(ranks):
    fresh = ranks(2).run(state_found)
    draws = ranks(2).run(leave_state_behind)
    assert ranks(2).run(state_found) == fresh
    expected = {
        "parallel_state": False,
        "calculator": False,
        "dtype": "torch.float32",
        "grad": True,
        "groups": 1,
        "threads": 1,
        "visible_gpus": "",
    }
    assert fresh == [expected] * 2
    assert ranks(2).run(leave_state_behind) == draws


def test_least_recently_used_pool_makes_room():
    with RankPools(max_ranks_alive=3) as pools:
        one, two = pools(1), pools(2)
        one.run(process_id)
        two.run(process_id)
        assert one.is_alive
        assert two.is_alive
        assert pools(1) is one
        pools(2)  # one is now the least recently used
        pools(3)
        assert not one.is_alive
        assert not two.is_alive
    with pytest.raises(ValueError, match=r"world_size \(0\) must be at least 1"):
        RankPool(0)
