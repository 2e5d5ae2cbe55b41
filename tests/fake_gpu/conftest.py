"""The machine to play on, and Transformer Engine for it."""

import functools
from pathlib import Path

import pytest

from tests.fake_gpu import build
from tests.fake_gpu.outcomes import Play
from tests.fake_gpu.real_packages import Engine, Unavailable, pinned_engine


@pytest.fixture(scope="session")
def stub(tmp_path_factory) -> Path:
    """The folder of the stub of the CUDA runtime."""
    if (obstacle := build.obstacle()) is not None:
        pytest.skip(obstacle)
    folder: Path = tmp_path_factory.mktemp("stub")
    build.build(folder)
    return folder


@pytest.fixture(scope="session")
def play(stub) -> Play:
    return functools.partial(build.play, stub)


@pytest.fixture(scope="session")
def transformer_engine() -> Engine:
    """Transformer Engine's own Python, of the version that is tested."""
    try:
        return pinned_engine()
    except Unavailable as error:
        pytest.skip(str(error))
