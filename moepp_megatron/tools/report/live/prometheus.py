"""Watches all runs in folders, and serves their newest numbers to Prometheus."""

import contextlib
import ipaddress
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from moepp_megatron.catalogue import IN_LAYERS, OF_RECORD, Metric
from moepp_megatron.config import ConfigError
from moepp_megatron.experts import FFN
from moepp_megatron.file_names import RUN_FILES
from moepp_megatron.runtime.printable import printable
from moepp_megatron.tools.report.live.run import STATES, LiveRun, check_folder
from moepp_megatron.tools.report.run_data import ReportError, name_below, runs_inside
from moepp_megatron.tools.report.series import min_over_mean

# Values of the metric's labels, and the number.
Sample = tuple[tuple[str, ...], float]


@dataclass(frozen=True)
class _Exported:
    """One metric, and its labels besides ``run``, separated by commas."""

    name: str
    meaning: str
    labels: str = ""


def _served(row: Metric) -> _Exported:
    # A series for each expert of each layer would be thousands: Prometheus has their kinds.
    labels = row.labels.replace("layer,expert,", "layer,")
    return _Exported(row.prometheus, row.with_unit, labels)


OF_RECORDS: Mapping[str, _Exported] = {key: _served(row) for key, row in OF_RECORD.items()}
"""By the key of the record. Numbers under other keys are served as ``moepp_other{key="..."}``."""

OTHER = _Exported("moepp_other", "a number of the record that this table does not name", "key")
MIN_FFN_LOAD = _served(IN_LAYERS["min_ffn_load"])
PHI = _Exported("moepp_phi_ratio", "FFN share wanted: under perfect balance, or the budget's")
TRAIN_ITERS = _Exported("moepp_train_iters", "steps of the whole run")
RUN_INFO = _Exported("moepp_run_info", "1; the label name holds run.name", "name")
STATE = _Exported("moepp_run_state", "1 for the state that the run is in, else 0", "state")
RECORD_AGE = _Exported("moepp_record_age_seconds", "time since the last record was written")
ALERTS = _Exported("moepp_alerts", "alerts so far, by rule and severity", "rule,severity")
OF_RUN = (RUN_INFO, STATE, RECORD_AGE, TRAIN_ITERS, PHI, ALERTS)
"""Served with the records' numbers."""


def _samples_of(run: LiveRun) -> Iterator[tuple[_Exported, list[Sample]]]:
    """The metrics of a run as it was at the last poll."""
    state = run.health().state
    yield from _of_run(run, state)
    # One that is silent or over has no numbers of records, so that graphs end where the run did.
    if run.history.newest is None or state != "running":
        return
    sums: dict[_Exported, dict[tuple[str, ...], float]] = {}
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


def _of_run(run: LiveRun, state: str) -> Iterator[tuple[_Exported, list[Sample]]]:
    yield STATE, [((name,), float(name == state)) for name in STATES]
    if run.config is not None:
        yield RUN_INFO, [((run.config.run.name,), 1.0)]
        yield TRAIN_ITERS, [((), run.config.training.train_iters)]
        yield PHI, [((), run.config.phi)]
    if run.record_age_s is not None:
        yield RECORD_AGE, [((), run.record_age_s)]
    yield ALERTS, [(labels, float(n)) for labels, n in sorted(run.alert_counts.items())]


ADDRESS = "127.0.0.1"


class LiveRuns:
    """The runs of some folders; `look` updates them.

    A folder is a run's, or holds folders of runs directly: then each of them counts, also one that
    comes later. ReportError if a path is not a folder, or has nothing to do with a run.
    """

    def __init__(self, folders: Sequence[Path], clock: Callable[[], float] = time.time) -> None:
        self._folders = list(dict.fromkeys(Path(os.path.abspath(folder)) for folder in folders))
        for folder in folders:
            if _runs_in(folder) == [folder]:
                check_folder(folder)
        self._base = Path(os.path.commonpath(self._folders))
        self._clock = clock
        self._runs: dict[Path, LiveRun] = {}

    @property
    def has_one_run(self) -> bool:
        """True if there is one folder, and it is a run's or empty."""
        return len(self._folders) == 1 and _runs_in(self._folders[0]) == self._folders

    def look(self) -> dict[str, LiveRun]:
        """Read new records and return runs by name; a run that cannot be read stays as it was.

        A name is the path below the folder that all given folders share, whatever runs are there.
        """
        known, self._runs = self._runs, {}
        for folder in itertools.chain.from_iterable(map(_runs_in, self._folders)):
            # Gone, or a file that is being replaced.
            with contextlib.suppress(ReportError):
                self._runs[folder] = known.get(folder) or LiveRun(folder, self._clock)
                self._runs[folder].poll()
        return {name_below(self._base, folder): run for folder, run in self._runs.items()}


def _runs_in(folder: Path) -> list[Path]:
    """The folders of runs in a folder; the folder itself if it is a run's, or holds none."""
    if any((folder / name).exists() for name in RUN_FILES):
        return [folder]
    return runs_inside(folder) or [folder]


class _RunsCollector(Collector):
    """Reads the new records of runs at each request and returns their newest numbers."""

    def __init__(self, runs: LiveRuns) -> None:
        self._runs = runs
        self._lock = threading.Lock()

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Describe no metrics in advance, because they depend on the records."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The metrics of this moment, each with the samples of all runs."""
        families: dict[str, GaugeMetricFamily] = {}
        # Requests are served by threads.
        with self._lock:
            for name, run in self._runs.look().items():
                for metric, samples in _samples_of(run):
                    family = families.setdefault(metric.name, _family(metric))
                    for labels, number in samples:
                        # They may come from elsewhere, and half a surrogate pair has no bytes.
                        shown = [printable(label, keep="") for label in labels]
                        family.add_metric([name, *shown], number)
        yield from families.values()


def serve(runs: LiveRuns, port: int, host: str = ADDRESS) -> str:
    """Serve runs on ``host:port`` from background threads, and return the address to scrape.

    Port 0 takes a free one. ConfigError if the port is not available.
    """
    # The first look reads all that is there, and a scraper waits ten seconds for an answer.
    runs.look()
    registry = CollectorRegistry()
    registry.register(_RunsCollector(runs))
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(
            f"--prometheus ({port}) must be a free port of {host} ({error.strerror}); "
            "use another one, or another --bind"
        ) from None
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{server.server_port}/metrics"


def is_open(host: str) -> bool:
    """True if other machines can reach an address."""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def wait_until_stopped() -> None:
    """Returns at Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


def _family(metric: _Exported) -> GaugeMetricFamily:
    labels = metric.labels.split(",") if metric.labels else []
    return GaugeMetricFamily(metric.name, metric.meaning, labels=["run", *labels])
