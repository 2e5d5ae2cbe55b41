"""The catalogue of metrics, and what is made of it."""

import math
from types import NoneType
from typing import get_args, get_origin

import pytest

from moepp_megatron.catalogue import IN_LAYERS, METRICS, OF_RECORD
from moepp_megatron.experts import ExpertCounts
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.observe.numbers import numbers
from moepp_megatron.observe.tensorboard import _tag_of


def test_every_key_of_a_record_has_a_row():
    assert list(OF_RECORD) == list(StepMetrics.model_fields)
    assert not OF_RECORD.keys() & IN_LAYERS.keys()


def test_no_two_metrics_share_a_name_or_a_plot():
    tags = [_tag_of(key) for key, row in OF_RECORD.items() if not row.labels and key != "step"]
    assert len(set(tags)) == len(tags)
    for of in (
        [row.prometheus for row in METRICS.values() if row.prometheus],
        [row.drawn.title for row in METRICS.values() if row.drawn],
        [row.panel[0] for row in METRICS.values() if row.panel],
    ):
        assert len(set(of)) == len(of)


def nesting(annotation):
    """The lists and objects of a field, the outermost first."""
    inner = [each for each in get_args(annotation) if each is not NoneType]
    origin = get_origin(annotation)
    if origin in (list, dict):
        return [origin, *nesting(inner[-1])]
    return nesting(inner[0]) if inner else []


@pytest.mark.parametrize("key", OF_RECORD)
def test_the_labels_of_a_row_are_those_of_its_data(key):
    by_place = {"layer", "expert", "ffn_experts"}
    holds = [list if axis in by_place else dict for axis in OF_RECORD[key].axes]
    assert nesting(StepMetrics.model_fields[key].annotation) == holds


def test_every_number_of_a_record_has_its_labels():
    experts = ExpertCounts(1, num_constant_experts=0, num_copy_experts=0, num_zero_experts=1)
    record = {
        "loss": math.inf,
        "mfu": None,
        "own_key": 3,
        "own_text": "no number",
        "too_large": 2**70,
        "expert_share": [0.75, 0.25],
        "layer_expert_share": [[0.5, 0.5], [1.0]],
        "router_health": {"gate_entropy": [1.0, 2.0]},
        "layer_ffn_histogram": [[0.25, 0.75]],
        "source_expert_share": {"web": [0.5, 0.5]},
    }
    assert list(numbers(record.items(), experts, [2, 4])) == [
        ("loss", (), math.inf),
        ("own_key", (), 3),
        ("expert_share", ("FFN 0", "FFN"), 0.75),
        ("expert_share", ("zero 0", "zero"), 0.25),
        ("layer_expert_share", ("2", "FFN 0", "FFN"), 0.5),
        ("layer_expert_share", ("2", "zero 0", "zero"), 0.5),
        ("router_health", ("gate_entropy", "2"), 1.0),
        ("router_health", ("gate_entropy", "4"), 2.0),
        # One layer where two are known: its number in the model is not.
        ("layer_ffn_histogram", ("1", "0"), 0.25),
        ("layer_ffn_histogram", ("1", "1"), 0.75),
        ("source_expert_share", ("web", "FFN 0", "FFN"), 0.5),
        ("source_expert_share", ("web", "zero 0", "zero"), 0.5),
    ]
    unknown = [key for key, _, _ in numbers(record.items(), None)]
    assert unknown == ["loss", "own_key", *["router_health"] * 2, *["layer_ffn_histogram"] * 2]
