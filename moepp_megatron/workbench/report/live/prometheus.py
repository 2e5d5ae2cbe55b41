"""Serves the newest numbers of runs to Prometheus, by default only on this machine."""

from __future__ import annotations

import contextlib
import ipaddress
import threading
from collections.abc import Iterable, Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from moepp_megatron.config import ConfigError
from moepp_megatron.config.printable import printable
from moepp_megatron.workbench.report.live.exported import Exported, samples_of
from moepp_megatron.workbench.report.live.runs import LiveRuns
from moepp_megatron.workbench.report.live.server import NumbersServer

ADDRESS = "127.0.0.1"


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
                for metric, samples in samples_of(run):
                    family = families.setdefault(metric.name, _family(metric))
                    for labels, number in samples:
                        # They may come from elsewhere, and half a surrogate pair has no bytes.
                        shown = [printable(label, keep="") for label in labels]
                        family.add_metric([name, *shown], number)
        yield from families.values()


def serve(runs: LiveRuns, port: int, host: str = ADDRESS) -> str:
    """Serves runs on ``host:port`` from background threads.

    Args:
        runs: The runs; nothing else may use them from here on.
        port: The port; 0 takes a free one.
        host: The address to listen on, ``0.0.0.0`` for all of this machine.

    Returns:
        The address to scrape.

    Raises:
        ConfigError: If the port is not available.
    """
    # The first look reads all that is there, and a scraper waits ten seconds for an answer.
    runs.look()
    registry = CollectorRegistry()
    registry.register(_RunsCollector(runs))
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
    """Whether other machines can reach an address."""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def wait_until_stopped() -> None:
    """Returns at Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


def _family(metric: Exported) -> GaugeMetricFamily:
    labels = metric.labels.split(",") if metric.labels else []
    return GaugeMetricFamily(metric.name, metric.meaning, labels=["run", *labels])
