"""A machine to plan for, and a process of its own for ranks that are built."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from moepp_megatron.config.hardware import load_hardware
from moepp_megatron.workbench.planning.machine import Machine, machine_of


@pytest.fixture(scope="module")
def h100() -> Machine:
    return machine_of(load_hardware("h100_sxm"))


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool
