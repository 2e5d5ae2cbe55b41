"""Megatron-Bridge is asked for where it is used; tests/bridge has the tests with it."""

import importlib
import sys

import pytest


def test_what_needs_bridge_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)
    monkeypatch.delitem(sys.modules, "moepp_megatron.interop.bridge", raising=False)
    with pytest.raises(ImportError, match="needs megatron-bridge, which cannot be imported"):
        importlib.import_module("moepp_megatron.interop.bridge")
