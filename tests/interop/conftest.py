"""A process for the transformers package."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

RunPlain = Callable[..., Any]


@pytest.fixture(scope="session")
def plain() -> Iterator[RunPlain]:
    """`plain(fn, *args)` runs a module-level function in a process with torch as it is."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("needs the package transformers")
    environment = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(os.getpid).result()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        yield lambda function, *args: pool.submit(function, *args).result(timeout=240)
