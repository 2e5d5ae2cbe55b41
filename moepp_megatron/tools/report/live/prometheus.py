"""Watches all runs in folders, and serves their newest numbers to Prometheus."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from moepp_megatron.config import ConfigError
from moepp_megatron.file_names import RUN_FILES
from moepp_megatron.runtime.printable import printable
from moepp_megatron.tools.report.live.exported import Exported, samples_of
from moepp_megatron.tools.report.live.run import LiveRun, check_folder
from moepp_megatron.tools.report.run_data import ReportError, name_below, runs_inside

ADDRESS = "127.0.0.1"
# A scraper sends its request at once, and asks every few seconds.
REQUEST_S = 5.0
MAX_THREADS = 8


class LiveRuns:
    """The runs of some folders; `look` updates them.

    A folder is a run's, or holds folders of runs directly: then each of them counts, also one that
    comes later.

    Raises:
        ReportError: If a path is not a folder, or has nothing to do with a run.
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
        """Read new records; a run that cannot be read stays as it was.

        Returns:
            Every run by its name: the path below the folder that all have in common. It depends on
            the folders that were given, not on which runs there are.
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
        port: The port; 0 takes a free one.

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
        server = _NumbersServer(host, port, lambda: generate_latest(registry), CONTENT_TYPE_LATEST)
    except OSError as error:
        raise ConfigError(
            f"--prometheus ({port}) must be a free port of {host} ({error.strerror}); "
            "use another one, or another --bind"
        ) from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
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


def _family(metric: Exported) -> GaugeMetricFamily:
    labels = metric.labels.split(",") if metric.labels else []
    return GaugeMetricFamily(metric.name, metric.meaning, labels=["run", *labels])


class _NumbersServer(ThreadingHTTPServer):
    """Answers GET with what `content` returns, as Prometheus's text."""

    daemon_threads = True

    def __init__(
        self, host: str, port: int, content: Callable[[], bytes], content_type: str
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.content, self.content_type = content, content_type
        self._free = threading.BoundedSemaphore(MAX_THREADS)
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for the request; close it if all threads are busy."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, in a thread of its own."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report nothing, because a client may disconnect at any time."""


class _Handler(BaseHTTPRequestHandler):
    server: _NumbersServer

    def setup(self) -> None:
        """Start the clock; a limit only on each read would admit an endless slow request."""
        super().setup()
        self._deadline = threading.Timer(REQUEST_S, self._give_up)
        self._deadline.daemon = True
        self._deadline.start()

    def finish(self) -> None:
        """Stop the clock."""
        self._deadline.cancel()
        super().finish()

    def _give_up(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:  # noqa: N802 (http.server's name)
        """Answer with the numbers, at / and /metrics."""
        # The request is here; whoever does not take the answer is not waited for either.
        self._deadline.cancel()
        self.connection.settimeout(REQUEST_S)
        if self.path.partition("?")[0] not in ("/", "/metrics"):
            self.send_error(404)
            return
        content = self.server.content()
        self.send_response(200)
        self.send_header("Content-Type", self.server.content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, because a scraper asks every few seconds."""
