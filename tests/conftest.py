"""Fixtures and collection rules for every test."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parallel.ranks import RankPools


def _import_triton_for_its_interpreter() -> None:
    """Have kernels interpreted where there is no GPU (tests/unit/moe/test_kernels.py).

    Triton decides when it is imported whether its own functions, `tl.sum` and the like, are
    compiled or interpreted; so before any test imports megatron-core, which imports it. The
    variable is taken back: processes that tests start are to be like a user's.
    """
    if shutil.which("nvidia-smi") or Path("/dev/nvidiactl").exists():
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        try:
            import triton.language  # noqa: F401
        except ImportError:
            return


_import_triton_for_its_interpreter()


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
