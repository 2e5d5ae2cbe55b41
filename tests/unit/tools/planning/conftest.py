"""A machine to plan for, and a process of its own for ranks that are built."""

import os
from concurrent.futures import ProcessPoolExecutor

import pytest

from moepp_megatron.config.hardware import load_hardware
from moepp_megatron.tools.planning.machine import Machine
from tests.parallel.ranks import fork_server


@pytest.fixture(scope="module")
def h100():
    return Machine.of(load_hardware("h100_sxm"))


@pytest.fixture(scope="module")
def elsewhere():
    with fork_server() as context:
        pool = ProcessPoolExecutor(1, mp_context=context)
        # Started here, with the server's environment.
        pool.submit(os.getpid).result()
    with pool:
        yield pool
