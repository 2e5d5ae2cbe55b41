"""Tests on one card, or two: skipped with the reason where something is missing.

With MOEPP_TESTS_CARD=cpu the CPU stands for the card, and with MOEPP_TE_STAND_IN=1 the stand-in of
tests/te_stand_in for Transformer Engine: so the tests themselves are tested without a GPU
(tests/unit/test_gpu_tests.py).
"""

import importlib.util
import os

import pytest

from tests.unit.moe.conftest import megatron, one_rank  # noqa: F401

_HAS_STAND_IN = os.environ.get("MOEPP_TE_STAND_IN") == "1"


@pytest.fixture
def card():
    """The device under test."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def cuda():
    """For what a CPU cannot stand for."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture
def two_cards(card):
    """For ranks that talk to each other: NCCL refuses two of them on one card."""
    import torch

    if card.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")


@pytest.fixture
def transformer_engine(monkeypatch):
    """Transformer Engine, or its stand-in."""
    if _HAS_STAND_IN:
        from tests.te_stand_in.models import count_stand_in

        count_stand_in(monkeypatch)
    elif not have_transformer_engine():
        pytest.skip("needs Transformer Engine")
    from moepp_megatron.model import megatron_config

    # apex's kernel adds weight gradients to buffers, which a layer by itself has none of.
    monkeypatch.setattr(megatron_config, "have_fused_weight_gradient", lambda: False)


@pytest.fixture
def real_transformer_engine(cuda):
    """Transformer Engine itself."""
    if not have_transformer_engine():
        pytest.skip("needs Transformer Engine")


@pytest.fixture
def deepep(cuda, two_cards):
    """Skip without DeepEP, on which the flex dispatcher runs."""
    if importlib.util.find_spec("deep_ep") is None:
        pytest.skip("needs DeepEP")


def have_transformer_engine():
    from moepp_megatron.runtime import optional

    return optional.have_transformer_engine()
