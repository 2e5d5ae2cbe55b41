"""A process for the transformers package."""

import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest import mock

import pytest

RunPlain = Callable[..., Any]


@pytest.fixture(scope="session")
def plain():
    """`plain(fn, *args)` runs a module-level function in a process with torch as it is."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("needs the package transformers")
    environment = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, environment):
            pool.submit(os.getpid).result()
        yield lambda function, *args: pool.submit(function, *args).result(timeout=240)
