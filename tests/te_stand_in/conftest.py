"""These tests need megatron-core to find the stand-in on its first import.

So they run in a process of their own, which `tests/unit/fp8/test_with_stand_in.py` starts.
"""

import os

import pytest

from moepp_megatron.runtime import cpu_support

if os.environ.get("MOEPP_TE_STAND_IN") != "1":
    collect_ignore_glob = ["test_*.py"]
else:
    cpu_support.install()
    # Not before: it imports what imports megatron-core.
    from tests.unit.moe.conftest import megatron, one_rank  # noqa: F401


@pytest.fixture(autouse=True)
def transformer_engine(monkeypatch):
    """The stand-in counts as Transformer Engine, and nothing has been recorded."""
    from tests.te_stand_in.models import count_stand_in

    count_stand_in(monkeypatch)
