"""The numbers that `moepp monitor --prometheus` serves: the catalogue's, and those of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moepp_megatron.catalogue import IN_LAYERS, OF_RECORD, Metric
from moepp_megatron.experts import FFN
from moepp_megatron.tools.report.live.run import STATES, LiveRun
from moepp_megatron.tools.report.series import min_over_mean

# Values of the metric's labels, and the number.
Sample = tuple[tuple[str, ...], float]


@dataclass(frozen=True)
class Exported:
    """One metric.

    Attributes:
        labels: Labels of its values of one run, besides ``run``, separated by commas.
    """

    name: str
    meaning: str
    labels: str = ""


def _served(row: Metric) -> Exported:
    # A series for each expert of each layer would be thousands: Prometheus has their kinds.
    labels = row.labels.replace("layer,expert,", "layer,")
    return Exported(row.prometheus, row.with_unit, labels)


OF_RECORDS: Mapping[str, Exported] = {key: _served(row) for key, row in OF_RECORD.items()}
"""By the key of the record. Numbers under other keys are served as ``moepp_other{key="..."}``."""

OTHER = Exported("moepp_other", "a number of the record that this table does not name", "key")
MIN_FFN_LOAD = _served(IN_LAYERS["min_ffn_load"])
PHI = Exported("moepp_phi_ratio", "FFN share wanted: under perfect balance, or the budget's")
TRAIN_ITERS = Exported("moepp_train_iters", "steps of the whole run")
RUN_INFO = Exported("moepp_run_info", "1; the label name holds run.name", "name")
STATE = Exported("moepp_run_state", "1 for the state that the run is in, else 0", "state")
RECORD_AGE = Exported("moepp_record_age_seconds", "time since the last record was written")
ALERTS = Exported("moepp_alerts", "alerts so far, by rule and severity", "rule,severity")
OF_RUN = (RUN_INFO, STATE, RECORD_AGE, TRAIN_ITERS, PHI, ALERTS)
"""Served with the records' numbers."""


def samples_of(run: LiveRun) -> Iterator[tuple[Exported, list[Sample]]]:
    """The metrics of a run as it was at the last poll.

    A run that is silent or over keeps its state, age and alerts, but no numbers of records, so
    that graphs end where the run did.
    """
    state = run.health().state
    yield from _of_run(run, state)
    if run.history.newest is None or state != "running":
        return
    sums: dict[Exported, dict[tuple[str, ...], float]] = {}
    loads: dict[str, list[float]] = {}
    for key, labels, value in run.numbers():
        metric = OF_RECORDS.get(key, OTHER)
        if metric is OTHER:
            labels = (key,)
        elif metric.labels:
            named = dict(zip(OF_RECORD[key].labels.split(","), labels, strict=True))
            labels = tuple(named[label] for label in metric.labels.split(","))
        samples = sums.setdefault(metric, {})
        samples[labels] = samples.get(labels, 0.0) + value
        if key == "layer_expert_share" and labels[1] == FFN.name:
            loads.setdefault(labels[0], []).append(value)
    yield from ((metric, [*samples.items()]) for metric, samples in sums.items())
    if run.config is not None:
        yield MIN_FFN_LOAD, [((layer,), min_over_mean(row)) for layer, row in loads.items()]


def _of_run(run: LiveRun, state: str) -> Iterator[tuple[Exported, list[Sample]]]:
    yield STATE, [((name,), float(name == state)) for name in STATES]
    if run.config is not None:
        yield RUN_INFO, [((run.config.run.name,), 1.0)]
        yield TRAIN_ITERS, [((), run.config.training.train_iters)]
        yield PHI, [((), run.config.phi)]
    if run.record_age_s is not None:
        yield RECORD_AGE, [((), run.record_age_s)]
    yield ALERTS, [(labels, float(n)) for labels, n in sorted(run.alert_counts.items())]
