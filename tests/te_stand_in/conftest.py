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
    from transformer_engine.pytorch.record import CALLS

    from moepp_megatron.model import build, megatron_config

    for module in (build, megatron_config):
        monkeypatch.setattr(module, "have_transformer_engine", lambda: True)
    fields = megatron_config._kernel_fields
    monkeypatch.setattr(
        megatron_config,
        "_kernel_fields",
        # As on a GPU: Transformer Engine's modules initialise their own weights.
        lambda config: fields(config) | {"use_cpu_initialization": False},
    )
    CALLS.clear()
