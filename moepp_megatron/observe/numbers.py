"""Iteration over every number of a record, by the catalogue."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moepp_megatron.catalogue import OF_RECORD, Metric
from moepp_megatron.experts import ExpertCounts

Labels = tuple[str, ...]
_LARGEST = 2**63


def numbers(
    values: Iterable[tuple[str, Any]], experts: ExpertCounts | None, moe_layers: Sequence[int] = ()
) -> Iterator[tuple[str, Labels, float]]:
    """Yield every number: its key, the values of its row's labels, and the number itself.

    A number without a row in the catalogue has no labels. Numbers of experts are left out without
    `experts`, those of an MoE layer, and where a list has another length. `moe_layers` has the
    numbers of the MoE layers in the model, from 1; by default 1, 2, ...
    """

    def walk(value: Any, axes: Sequence[str]) -> Iterator[tuple[Labels, float]]:
        if not axes:
            # A whole number of any size is JSON, and no float holds it.
            if isinstance(value, float) or (type(value) is int and abs(value) < _LARGEST):
                yield (), value
            return
        for labels, inner in _entries(axes[0], value, experts, moe_layers):
            for further, number in walk(inner, axes[1:]):
                yield (*labels, *further), number

    for key, value in values:
        if value is not None:
            axes = OF_RECORD[key].axes if key in OF_RECORD else ()
            yield from ((key, *found) for found in walk(value, axes))


def _entries(
    axis: str, value: Any, experts: ExpertCounts | None, moe_layers: Sequence[int]
) -> Iterable[tuple[Labels, Any]]:
    """The entries of a list or object with the labels of each; `KeyError` for an unknown axis."""
    if isinstance(value, Mapping):
        return (((name,), inner) for name, inner in value.items())
    count = len(value)
    fits = experts is not None and experts.num_experts == count
    named: dict[str, Iterable[Labels]] = {
        "expert": zip(experts.names, experts.kinds, strict=True) if experts and fits else (),
        "layer": ((str(number),) for number in layer_numbers(moe_layers, count)),
        "ffn_experts": ((str(number),) for number in range(count)),
    }
    # Without experts there is no label to any entry.
    return zip(named[axis], value, strict=False)


def layer_numbers(known: Sequence[int], count: int) -> Sequence[int]:
    """Return `known`, numbers of MoE layers from 1; without `count` of them, 1 to `count`."""
    return known if len(known) == count else range(1, count + 1)


def path_of(row: Metric, labels: Labels) -> list[str]:
    """Path of a number in views with folders, such as `["gate_entropy", "moe_layer_2"]`."""
    return [
        (f"moe_layer_{label}" if name == "layer" else label).replace(" ", "_")
        for name, label in zip(row.labels.split(","), labels, strict=True)
        if name != "kind"
    ]


def name_of(row: Metric, labels: Labels) -> str:
    """Readable label of a number, such as `layer 2` or `web`."""
    words = {"layer": "layer {}", "ffn_experts": "{} FFN experts"}
    named = zip(row.labels.split(","), labels, strict=True)
    return " ".join(words.get(name, "{}").format(of) for name, of in named if name != "kind")


def is_curve(row: Metric) -> bool:
    """True for a time series, not one of each layer's distribution."""
    return not (row.is_distribution and "layer" in row.axes)
