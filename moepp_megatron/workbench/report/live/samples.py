"""Turns a run's newest numbers into samples: metric, labels, value."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moepp_megatron.observe.layer_numbers import layer_numbers
from moepp_megatron.workbench.report.live import exported
from moepp_megatron.workbench.report.live.exported import OF_RECORDS, OTHER, Exported
from moepp_megatron.workbench.report.live.liveness import STATES
from moepp_megatron.workbench.report.live.run import LiveRun
from moepp_megatron.workbench.report.run_data import RunConfig

# Anything else is over, or has stood still: its last numbers are no longer those of now.
_LIVE_STATES = ("running",)

# Values of the metric's labels, and the number.
Sample = tuple[tuple[str, ...], float]


def samples_of(run: LiveRun) -> Iterator[tuple[Exported, list[Sample]]]:
    """The metrics of a run as it was at the last poll.

    A run that is silent or over keeps its state, age and alerts, but no numbers of records, so
    that graphs end where the run did.
    """
    state = run.health().state
    yield from _of_run(run, state)
    if run.history.newest is None or state not in _LIVE_STATES:
        return
    others: list[Sample] = []
    for key, value in sorted(run.history.latest.items()):
        if key in OF_RECORDS:
            yield OF_RECORDS[key], [((), value)]
        else:
            others.append(((key,), value))
    if others:
        yield OTHER, others
    yield from _lists(run.history.latest_lists, run.config)


def _of_run(run: LiveRun, state: str) -> Iterator[tuple[Exported, list[Sample]]]:
    yield exported.STATE, [((name,), float(name == state)) for name in STATES]
    if run.config is not None:
        yield exported.RUN_INFO, [((run.config.run.name,), 1.0)]
        yield exported.TRAIN_ITERS, [((), run.config.training.train_iters)]
        yield exported.PHI, [((), run.config.phi)]
    age = run.record_age_s
    if age is not None:
        yield exported.RECORD_AGE, [((), age)]
    counts = sorted(run.alert_counts.items())
    yield exported.ALERTS, [(labels, float(number)) for labels, number in counts]


def _lists(
    values: Mapping[str, Any], config: RunConfig | None
) -> Iterator[tuple[Exported, list[Sample]]]:
    """Turn the records' lists into labelled metrics."""
    for key, metric in OF_RECORDS.items():
        content = values.get(key)
        if metric.labels and content:
            samples = _samples(metric, content, config)
            if samples:
                yield metric, samples
    if config is not None:
        yield exported.MIN_FFN_LOAD, _idlest(values.get("layer_expert_share") or [], config)


def _samples(metric: Exported, content: Any, config: RunConfig | None) -> list[Sample]:
    """Turn one list, or lists by name, into samples; none if experts are needed and unknown."""
    if metric.labels in ("source", "class", "set", "task"):
        return [((name,), value) for name, value in content.items()]
    if metric.labels == "ffn_experts":
        return [((str(count),), loss) for count, loss in enumerate(content)]
    if metric.labels == "layer,metric":
        return [
            ((layer, name), value)
            for name, row in content.items()
            for layer, value in _by_layer(row, config)
        ]
    if metric.labels == "layer":
        return [((layer,), share) for layer, share in _by_layer(content, config)]
    if metric.labels == "layer,ffn_experts":
        return [
            ((layer, str(count)), share)
            for layer, row in _by_layer(content, config)
            for count, share in enumerate(row)
        ]
    if config is None:
        return []
    kinds = config.experts.kinds
    if metric.labels == "source,expert,kind":
        return [
            ((source, *expert), share)
            for source, row in content.items()
            if len(row) == len(kinds)
            for expert, share in zip(
                zip(config.experts.names, kinds, strict=True), row, strict=True
            )
        ]
    if metric.labels == "expert,kind":
        if len(content) != len(kinds):
            return []
        return list(zip(zip(config.experts.names, kinds, strict=True), content, strict=True))
    assert metric.labels == "layer,kind", f"{metric.name} has labels of its own"
    return [
        ((layer, kind), sum(share for share, of in zip(row, kinds, strict=True) if of == kind))
        for layer, row in _by_layer(content, config)
        if len(row) == len(kinds)
        for kind in dict.fromkeys(kinds)
    ]


def _by_layer(rows: Sequence[Any], config: RunConfig | None) -> Iterator[tuple[str, Any]]:
    """Pair each MoE layer's entry with the layer's number in the model."""
    numbers = layer_numbers(config.moe_layers if config is not None else (), len(rows))
    return zip(map(str, numbers), rows, strict=True)


def _idlest(rows: Sequence[Sequence[float]], config: RunConfig) -> list[Sample]:
    """The least share of an FFN expert over their mean, for each layer; NaN if that is 0."""
    experts = config.experts
    if not experts.num_ffn_experts or any(len(row) != experts.num_experts for row in rows):
        return []
    shares = [(layer, row[: experts.num_ffn_experts]) for layer, row in _by_layer(rows, config)]
    return [
        ((layer,), min(row) * len(row) / sum(row) if sum(row) > 0 else math.nan)
        for layer, row in shares
    ]
