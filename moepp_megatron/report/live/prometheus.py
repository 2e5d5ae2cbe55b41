"""The newest record of a run, served to Prometheus, on this machine only unless told otherwise."""

from __future__ import annotations

import contextlib
import ipaddress
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from moepp_megatron.config import ConfigError
from moepp_megatron.observe.expert_names import layer_numbers
from moepp_megatron.report.live import exported
from moepp_megatron.report.live.exported import OF_RECORDS, OTHER, Exported
from moepp_megatron.report.live.health import STATES
from moepp_megatron.report.live.run import LiveRun
from moepp_megatron.report.live.server import NumbersServer
from moepp_megatron.report.run_data import ReportError, RunConfig

ADDRESS = "127.0.0.1"
# Anything else is over, or has stood still: its last numbers are no longer those of now.
LIVE_STATES = ("running",)

Sample = tuple[tuple[str, ...], float]


class RunCollector(Collector):
    """Reads what is new in a run's folder at each request and hands out the newest numbers.

    A run that is silent or over keeps its state, age and alerts, but no numbers of records, so
    that graphs end where the run did.

    Args:
        run: The run; used by this collector alone.
    """

    def __init__(self, run: LiveRun) -> None:
        self._run = run
        self._lock = threading.Lock()

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Nothing: which numbers there are depends on the record."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The metrics of this moment."""
        # Requests are served by threads.
        with self._lock:
            # A file that is being replaced; what the look before saw holds until the next.
            with contextlib.suppress(ReportError):
                self._run.poll()
            families = list(self._families())
        yield from families

    def _families(self) -> Iterator[GaugeMetricFamily]:
        run = self._run
        state = run.health().state
        yield from self._of_run(state)
        if run.history.newest is None or state not in LIVE_STATES:
            return
        for key, value in sorted(run.history.latest.items()):
            if key in OF_RECORDS:
                yield _family(OF_RECORDS[key], [((), value)])
        others = [
            ((key,), value)
            for key, value in sorted(run.history.latest.items())
            if key not in OF_RECORDS
        ]
        if others:
            yield _family(OTHER, others, ("key",))
        yield from _lists(run.history.latest_lists, run.config)

    def _of_run(self, state: str) -> Iterator[GaugeMetricFamily]:
        run = self._run
        states = [((name,), float(name == state)) for name in STATES]
        yield _family(exported.STATE, states, ("state",))
        if run.config is not None:
            yield _family(exported.RUN_INFO, [((run.config.run.name,), 1.0)], ("run",))
            yield _family(exported.TRAIN_ITERS, [((), run.config.training.train_iters)])
            yield _family(exported.PHI, [((), run.config.phi)])
        age = run.record_age_s
        if age is not None:
            yield _family(exported.RECORD_AGE, [((), age)])
        counts = sorted(run.alert_counts.items())
        alerts: list[Sample] = [(labels, float(number)) for labels, number in counts]
        yield _family(exported.ALERTS, alerts, ("rule", "severity"))


def serve(run: LiveRun, port: int, host: str = ADDRESS) -> str:
    """Serves a run on ``host:port`` from background threads.

    Args:
        run: The run; nothing else may use it from here on.
        port: The port; 0 takes a free one.
        host: The address to listen on, ``0.0.0.0`` for all of this machine.

    Returns:
        The address to scrape.

    Raises:
        ConfigError: The port cannot be had.
    """
    registry = CollectorRegistry()
    registry.register(RunCollector(run))
    try:
        server = NumbersServer(host, port, lambda: generate_latest(registry), CONTENT_TYPE_LATEST)
    except OSError as error:
        raise ConfigError(
            f"--prometheus ({port}) must be a free port of {host} ({error.strerror}); "
            "use another one, or another --bind"
        ) from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{server.server_port}/metrics"


def is_open(host: str) -> bool:
    """Whether machines besides this one can ask at an address."""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def wait_until_stopped() -> None:
    """Returns at Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


def _lists(values: Mapping[str, Any], config: RunConfig | None) -> Iterator[GaugeMetricFamily]:
    """The lists of records as labelled metrics."""
    for key, metric in OF_RECORDS.items():
        content = values.get(key)
        if metric.labels and content:
            samples = _samples(metric, content, config)
            if samples:
                yield _family(metric, samples, tuple(metric.labels.split(",")))


def _samples(metric: Exported, content: Any, config: RunConfig | None) -> list[Sample]:
    """One list, or lists by name, as samples; none where experts are needed and unknown."""
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
    """Each MoE layer's entry with the layer's number in the model."""
    numbers = layer_numbers(config.moe_layers if config is not None else (), len(rows))
    return zip(map(str, numbers), rows, strict=True)


def _family(
    metric: Exported, samples: Iterable[Sample], labels: tuple[str, ...] = ()
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(metric.name, metric.meaning, labels=labels)
    for values, number in samples:
        family.add_metric(values, number)
    return family
