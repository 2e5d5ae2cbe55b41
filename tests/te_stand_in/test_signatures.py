"""The comparison that tests/gpu makes with Transformer Engine itself."""

import pytest
import transformer_engine.pytorch as te

from tests.te_stand_in.signatures import actual, fits, promised


def test_what_is_promised_is_found_under_its_name():
    found = promised()
    assert {
        "transformer_engine.pytorch:GroupedLinear",
        "transformer_engine.pytorch:GroupedLinear.forward",
        "transformer_engine.pytorch:Fp8Padding.forward",
        "transformer_engine.pytorch.permutation:moe_permute_with_probs",
        "transformer_engine.pytorch.quantization:autocast",
        "transformer_engine.common.recipe:DelayedScaling",
    } <= found.keys()
    assert found["transformer_engine.common.recipe:DelayedScaling"][:2] == ["margin", "fp8_format"]
    for path, names in found.items():
        assert actual(path) == names, path


def test_a_missing_or_moved_parameter_is_noticed(monkeypatch):
    wanted = promised()["transformer_engine.pytorch:GroupedLinear.forward"]
    assert fits(wanted, wanted)
    assert fits(wanted, [*wanted, "another"])
    assert not fits(wanted, [wanted[1], wanted[0], *wanted[2:]])
    assert not fits(wanted, [name for name in wanted if name != "m_splits"])
    monkeypatch.delattr(te, "GroupedLinear")
    with pytest.raises(AttributeError, match="GroupedLinear"):
        actual("transformer_engine.pytorch:GroupedLinear.forward")
