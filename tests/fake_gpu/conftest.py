"""The machine to play on, and Transformer Engine for it."""

import functools

import pytest

from tests.fake_gpu import build
from tests.fake_gpu.real_packages import Unavailable, pinned_engine


@pytest.fixture(scope="session")
def stub(tmp_path_factory):
    """The folder of the stub of the CUDA runtime."""
    if (obstacle := build.obstacle()) is not None:
        pytest.skip(obstacle)
    folder = tmp_path_factory.mktemp("stub")
    build.build(folder)
    return folder


@pytest.fixture(scope="session")
def play(stub):
    return functools.partial(build.play, stub)


@pytest.fixture(scope="session")
def transformer_engine():
    """Transformer Engine's own Python, of the version that is tested."""
    try:
        return pinned_engine()
    except Unavailable as error:
        pytest.skip(str(error))
