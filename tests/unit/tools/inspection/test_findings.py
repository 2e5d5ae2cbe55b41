"""Means over groups of tokens, counted by hand."""

import json
import math

import numpy as np
import pytest

from moepp_megatron.experts import ExpertCounts
from moepp_megatron.tools.inspection.findings import Findings, Trace, _extremes, to_json
from tests.unit.tools.inspection.conftest import invented_trace, model

# Experts: FFN 0, FFN 1, constant 2, copy 3, zero 4. Two layers, four tokens.
SELECTED = np.array([[[0, 1], [1, 4], [4, 3], [0, 1]], [[1, 0], [3, 2], [4, 2], [0, 3]]])


def trace():
    return Trace(
        model(ExpertCounts(2, num_constant_experts=1), (1, 3)),
        SELECTED,
        np.full((2, 4, 2), 0.5),
        np.array([math.nan, 1.0, 2.0, 4.0]),
    )


def test_groups_are_means_of_their_tokens():
    assert trace().ffn.tolist() == [[2, 1, 0, 2], [2, 0, 0, 1]]
    first, second = trace().groups(["a", None, "a", "b"], "xyzw")
    assert (first.name, first.count, first.ffn, first.loss) == ("x", 2, 1.0, 2.0)
    # Standard deviation of 2 and 0 is sqrt(2), over sqrt(2) tokens.
    assert first.ffn_error == pytest.approx(1.0)
    assert first.kinds == (0.5, 0.125, 0.125, 0.25)
    assert (second.name, second.count, second.ffn, second.loss) == ("w", 1, 1.5, 4.0)
    assert math.isnan(second.ffn_error)
    everything = trace().group("all")
    assert (everything.count, everything.ffn) == (4, 1.0)
    assert everything.loss == pytest.approx(7 / 3)
    layer = trace().group("3", layers=slice(1, 2))
    assert (layer.ffn, layer.kinds) == (0.75, (0.375, 0.25, 0.25, 0.125))


def test_extremes_name_tokens_that_are_frequent_enough():
    numbers = np.random.default_rng(0).integers(0, 5, 60)
    least, most, fewest = _extremes(invented_trace(60), numbers, [f"t{n}" for n in numbers], 2)
    assert least == 5
    assert most[0].ffn >= most[1].ffn >= fewest[1].ffn >= fewest[0].ffn
    assert len({group.name for group in most + fewest}) == 4
    # Four tokens that occur once: nothing is left out, no token stands at both ends.
    least, most, fewest = _extremes(trace(), np.arange(4), list("abcd"), 12)
    assert least == 1
    assert [group.name for group in most] == ["a", "d"]
    assert [group.name for group in fewest] == ["c", "b"]


def test_json_has_every_selection_and_aggregate(make_request, text):
    request = make_request()
    invented = invented_trace(len(text))
    content = json.loads(to_json(request, invented))
    assert "".join(content["tokens"]["text"]) == text.text
    assert content["selected"] == invented.selected.tolist()
    assert content["loss"][0] is None
    assert content["loss"][1] == pytest.approx(invented.losses[1], abs=1e-6)
    assert sum(group["count"] for group in content["by_class"]) == len(text)
    assert content["whole"]["ffn"] == pytest.approx(Findings.of(request, invented).whole.ffn)
