"""Fixtures and collection rules for every test."""

from collections.abc import Iterator

import pytest

from tests.parallel.ranks import RankPools


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """`ranks(n).run(fn, *args)` runs a module-level function on n gloo ranks, started once."""
    with RankPools() as pools:
        yield pools


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = []
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker("parallel")
        if item.get_closest_marker("gpu"):
            gpu_items.append(item)
    if gpu_items and not _has_cuda():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def _has_cuda() -> bool:
    import torch  # seconds to import: only if a GPU test was collected

    return torch.cuda.is_available()
