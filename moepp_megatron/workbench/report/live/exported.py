"""The numbers that `moepp monitor --prometheus` serves: the catalogue's, and those of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moepp_megatron.catalogue import IN_LAYERS, OF_RECORD, Labels, Metric


@dataclass(frozen=True)
class Exported:
    """One metric.

    Attributes:
        name: Its name at Prometheus.
            meaning: Its meaning, in one line.
        labels: What tells its values of one run apart, beside ``run``, as the catalogue says;
            ``key`` is a key of the record.
    """

    name: str
    meaning: str
    labels: Labels = ""


def _served(row: Metric) -> Exported:
    return Exported(row.prometheus, row.with_unit, row.labels)


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
"""Served beside the records' numbers."""


def exported_names() -> set[str]:
    """Every name that may be served."""
    return {m.name for m in (*OF_RECORDS.values(), *OF_RUN, OTHER, MIN_FFN_LOAD)}
