"""The alert sinks of a training run: `RUN/alerts.jsonl`, the console, and a webhook."""

import contextlib
import http.client
import json
import logging
import math
import os
import queue
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.file_names import ALERTS_FILE
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.line_file import LineFile

logger = logging.getLogger(__name__)

# A service that is down must cost neither memory nor more than seconds at the end of a run.
_QUEUE_SIZE = 64
_ATTEMPTS = 3
_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 5.0
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


class _AlertSink(Protocol):
    """Receives alerts. One rank of a run owns the sinks."""

    def send(self, alert: Alert) -> None:
        """Receive one alert; returns at once."""

    def close(self) -> None:
        """End the sink; nothing is sent after it."""


class _AlertFile:
    """Appends each alert to `RUN/alerts.jsonl` as it comes; repeated steps keep theirs."""

    def __init__(self, path: Path, start_over: bool = False) -> None:
        self._file = LineFile(path, start_over)
        # A killed run may have left an unfinished line.
        self._file.cut(self._file.read().rfind(b"\n") + 1)

    def send(self, alert: Alert) -> None:
        """Append the alert; raises as `LineFile.append` does."""
        self._file.append(alert.to_json_line().encode())

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


class _AlertLines:
    """Prints each alert as one line."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def send(self, alert: Alert) -> None:
        """Print the alert."""
        self._say(alert.text())

    def close(self) -> None:
        """Close nothing: there are no resources."""


class AlertSinks:
    """Passes each alert to every sink. A failure is printed; the sink is tried again next time."""

    def __init__(self, sinks: Sequence[_AlertSink]) -> None:
        self._sinks = list(sinks)

    @classmethod
    def open(
        cls,
        run_dir: Path,
        run_name: str,
        say: Callable[[str], None],
        *,
        start_over: bool = False,
        webhook_url_env: str | None = None,
    ) -> "AlertSinks":
        """Open the alert file (emptied if `start_over`), the console, and a webhook if set."""
        wanted: dict[str, Callable[[], _AlertSink]] = {
            ALERTS_FILE: lambda: _AlertFile(run_dir / ALERTS_FILE, start_over)
        }
        if webhook_url_env is not None:
            wanted["webhook"] = lambda: _Webhook(read_address(webhook_url_env), run_name)
        sinks: list[_AlertSink] = [_AlertLines(say)]
        for name, make in wanted.items():
            try:
                sinks.append(make())
            except (OSError, ValueError) as error:  # a sink must not keep a run from starting
                logger.warning("no %s: %s", name, error)
        return cls(sinks)

    def send(self, alert: Alert) -> None:
        """Pass the alert on; nothing is raised, since an alert must not end a training run."""
        for sink in self._sinks:
            try:
                sink.send(alert)
            except Exception as error:
                logger.error(
                    "step %d: %s could not take an alert: %s",
                    alert.step,
                    type(sink).__name__,
                    error,
                )

    def close(self) -> None:
        """Close every sink, whatever the others do."""
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                logger.warning("%s could not be closed: %s", type(sink).__name__, error)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which could leave https or send the alert to another host."""

    def redirect_request(self, *_: object) -> None:
        return None


def read_address(variable: str) -> str:
    """Return the webhook's address from an environment variable.

    Raises ConfigError, without its value, if it is unset or neither https nor of this machine.
    """
    address = os.environ.get(variable, "").strip()
    if not address:
        raise ConfigError(
            f"the environment variable {variable} must hold the webhook's address; export it, or "
            "set observe.webhook_url_env to null"
        )
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urlsplit("")
    is_local = parts.scheme == "http" and host in _LOCAL_HOSTS
    if not host or (parts.scheme != "https" and not is_local):
        raise ConfigError(
            f"the environment variable {variable} must hold an https address, or an http address "
            "of localhost; correct it (its value is a secret and not shown)"
        )
    return address


class _Webhook:
    """Posts each alert as JSON from a thread: the fields of `Alert`, `run`, and `text` in words."""

    def __init__(
        self, address: str, run: str, timeout_s: float = _TIMEOUT_S, retry_s: float = 1.0
    ) -> None:
        self._address, self._run = address, run
        self._timeout_s, self._retry_s = timeout_s, retry_s
        # Proxies are for the way out of this machine.
        is_local = urlsplit(address).hostname in _LOCAL_HOSTS
        proxies = urllib.request.ProxyHandler({} if is_local else None)
        self._opener = urllib.request.build_opener(proxies, _NoRedirect)
        self._queue: queue.Queue[Alert | None] = queue.Queue(_QUEUE_SIZE)
        self._stop = threading.Event()
        self._failing = False
        # Each is written by one thread only.
        self._taken = 0
        self._delivered = 0
        self._thread = threading.Thread(target=self._deliver, name="moepp-webhook", daemon=True)
        self._thread.start()

    def send(self, alert: Alert) -> None:
        """Queue one alert; returns at once. If the queue is full, the alert is not sent."""
        self._taken += 1
        try:
            self._queue.put_nowait(alert)
        except queue.Full:
            self._complain("its queue is full")

    def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Wait for pending alerts, at most `timeout_s`; print how many were not sent."""
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(queue.Full):
            # The end of the queue; a full one is worked off first.
            self._queue.put(None, timeout=timeout_s)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        self._stop.set()
        if self._delivered < self._taken:
            logger.warning(
                "webhook: %d of %d alerts were not delivered",
                self._taken - self._delivered,
                self._taken,
            )

    def _deliver(self) -> None:
        """Run the thread: send one alert after the other."""
        while not self._stop.is_set():
            alert = self._queue.get()
            if alert is None:
                return
            self._try(self._body(alert))

    def _body(self, alert: Alert) -> bytes:
        # Chat services that take {"text": ...} show the text.
        fields: dict[str, Any] = {"run": self._run, "text": f"{self._run}: {alert.text()}"}
        fields |= alert.model_dump(mode="json", exclude_none=True)
        if not math.isfinite(alert.value):
            fields["value"] = None
        return json.dumps(fields, allow_nan=False).encode()

    def _try(self, body: bytes) -> None:
        reason = ""
        for attempt in range(_ATTEMPTS):
            if attempt and self._stop.wait(self._retry_s * 2 ** (attempt - 1)):
                break
            failure, may_help = self._post(body)
            if failure is None:
                if self._failing:
                    logger.info("webhook: alerts get through again")
                self._failing = False
                self._delivered += 1
                return
            reason = failure
            if not may_help:
                break
        self._complain(reason)

    def _post(self, body: bytes) -> tuple[str | None, bool]:
        """Make one attempt."""
        headers = {"Content-Type": "application/json", "User-Agent": "moepp"}
        request = urllib.request.Request(self._address, body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout_s):
                return None, False
        except urllib.error.HTTPError as error:
            error.close()
            # 4xx: the same again is refused again, except for "too many" and "too slow".
            return f"HTTP status {error.code}", error.code >= 500 or error.code in (408, 429)
        except Exception as error:
            return _reason(error), True

    def _complain(self, reason: str) -> None:
        """Log why an alert was not delivered, once for failures in a row."""
        if not self._failing:
            logger.warning(
                "webhook: an alert could not be delivered (%s); it is in alerts.jsonl, and "
                "further failures are not reported until one gets through",
                reason,
            )
        self._failing = True


def _reason(error: BaseException) -> str:
    """The error in words without the address, which an error's own message may contain."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return "timed out"
    if isinstance(cause, socket.gaierror):
        return "its name is not known"
    if isinstance(cause, ssl.SSLError):
        return "its TLS certificate or handshake failed"
    if isinstance(cause, OSError) and cause.errno is not None:
        return os.strerror(cause.errno)
    if isinstance(cause, http.client.HTTPException):
        return "it does not speak HTTP"
    return type(cause).__name__
