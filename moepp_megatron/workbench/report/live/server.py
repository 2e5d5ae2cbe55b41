"""A small HTTP server for numbers, with few threads and a time limit for requests."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# A scraper sends its request at once, and asks every few seconds.
REQUEST_S = 5.0
MAX_THREADS = 8


class NumbersServer(ThreadingHTTPServer):
    """Answers GET with what `content` returns, as Prometheus's text.

    Args:
        host: Address to listen on.
        port: Port; 0 takes a free one.
        content: Called for each request, by several threads.
        content_type: Content type of the answer.

    Raises:
        OSError: If the address is not available.
    """

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
    server: NumbersServer

    def setup(self) -> None:
        """Start the clock; a limit on each read alone would admit an endless slow request."""
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
