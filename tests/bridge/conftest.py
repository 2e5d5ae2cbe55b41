"""These tests need Megatron-Bridge, which tests/bridge/run.sh puts into a folder of its own."""

import importlib.util

import pytest

from tests.parallel.conftest import alone, trained  # noqa: F401


def pytest_collection_modifyitems(items):
    """Skip where it is not: it needs Python 3.12, and an older transformers than other tests."""
    if importlib.util.find_spec("megatron.bridge") is not None:
        return
    skip = pytest.mark.skip(reason="no Megatron-Bridge here; run tests/bridge/run.sh")
    for item in items:
        if "tests/bridge/" in item.nodeid:
            item.add_marker(skip)
