"""Alerts: the file, the line, and posts to a web address that never hold training up."""

import json
import logging
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.observe.alert_sinks import (
    AlertSinks,
    _AlertFile,
    _Webhook,
    read_address,
)
from moepp_megatron.observe.alerts import read_alerts
from tests.unit.observe.conftest import make_alert

SECRET = "/services/T000/B000/do-not-log-me"


class Service(ThreadingHTTPServer):
    """A web service on this machine that answers with `codes` in turn, after `delay_s`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, codes, delay_s=0.0):
        self.codes, self.delay_s = codes, delay_s
        self.bodies = []
        self.paths = []
        super().__init__(("127.0.0.1", 0), Answer)
        self.address = f"http://127.0.0.1:{self.server_port}{SECRET}"


class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        service = self.server
        assert isinstance(service, Service)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        service.paths.append(self.path)
        service.bodies.append(json.loads(body))
        code = service.codes.pop(0) if len(service.codes) > 1 else service.codes[0]
        time.sleep(service.delay_s)
        self.send_response(code)
        if code == 302:
            self.send_header("Location", f"{SECRET}/elsewhere")
        self.end_headers()

    def log_message(self, *_):
        """Nothing on stderr."""


@pytest.fixture
def service():
    """Starts services; all are stopped at the end."""
    running = []

    def start(*codes, delay_s=0.0):
        running.append(Service(list(codes), delay_s))
        threading.Thread(target=running[-1].serve_forever, args=(0.02,), daemon=True).start()
        return running[-1]

    yield start
    for one in running:
        one.shutdown()
        one.server_close()


def test_alerts_of_a_resumed_run_follow_the_earlier_ones(tmp_path):
    path = tmp_path / "alerts.jsonl"
    first = _AlertFile(path)
    first.send(make_alert(120, value=math.nan, layer=3))
    first.close()
    path.write_bytes(path.read_bytes() + b'{"step": 121, "ru')
    second = _AlertFile(path)
    second.send(make_alert(101))
    second.close()
    assert [alert.step for alert in read_alerts(path)] == [120, 101]
    assert json.loads(path.read_text().splitlines()[0])["value"] is None
    assert math.isnan(read_alerts(path)[0].value)
    _AlertFile(path, start_over=True).close()
    assert read_alerts(path) == read_alerts(tmp_path / "none.jsonl") == []


def test_a_failing_sink_keeps_no_alert_from_the_others(tmp_path, caplog):
    class Failing:
        def send(self, alert):
            raise OSError("disk gone")

        def close(self):
            raise OSError("disk gone")

    file = _AlertFile(tmp_path / "alerts.jsonl")
    sinks = AlertSinks([Failing(), file])
    sinks.send(make_alert())
    sinks.close()
    assert len(read_alerts(tmp_path / "alerts.jsonl")) == 1
    assert "Failing could not take an alert: disk gone" in caplog.text


def test_a_run_without_a_webhook_writes_and_says(tmp_path):
    said = []
    threads = set(threading.enumerate())
    sinks = AlertSinks.open(tmp_path, "quick", said.append)
    sinks.send(make_alert())
    sinks.close()
    assert [alert.rule for alert in read_alerts(tmp_path / "alerts.jsonl")] == ["dead_expert"]
    assert said == [make_alert().text()]
    assert set(threading.enumerate()) <= threads


def test_an_alert_is_posted(tmp_path, service, monkeypatch):
    server = service(200)
    monkeypatch.setenv("HOOK", server.address)
    sinks = AlertSinks.open(tmp_path, "quick", print, webhook_url_env="HOOK")
    sinks.send(make_alert(value=math.inf))
    sinks.close()
    (body,) = server.bodies
    assert (body["run"], body["rule"], body["value"]) == ("quick", "dead_expert", None)
    assert body["text"].startswith("quick: warning at step 7")
    assert server.paths == [SECRET]


def test_a_service_that_recovers_gets_the_alert(service, caplog):
    server = service(500, 503, 200)
    hook = _Webhook(server.address, "quick", retry_s=0.01)
    hook.send(make_alert())
    hook.close()
    assert len(server.bodies) == 3
    assert caplog.text == ""


@pytest.mark.parametrize(("code", "posts"), [(404, 1), (302, 1), (500, 3)])
def test_failures_are_told_once_and_without_the_address(service, caplog, code, posts):
    server = service(code)
    hook = _Webhook(server.address, "quick", retry_s=0.01)
    with caplog.at_level(logging.DEBUG):
        hook.send(make_alert(1))
        hook.send(make_alert(2))
        hook.close()
    assert len(server.bodies) == 2 * posts
    assert set(server.paths) == {SECRET}
    told = [m for m in caplog.messages if f"HTTP status {code}" in m]
    assert len(told) == 1
    assert "2 of 2 alerts were not delivered" in caplog.messages[-1]
    assert "do-not-log-me" not in caplog.text
    assert "127.0.0.1" not in caplog.text


def test_a_service_that_hangs_holds_nobody_up(service, caplog):
    server = service(200, delay_s=30.0)
    hook = _Webhook(server.address, "quick", timeout_s=0.05, retry_s=0.01)
    for step in range(200):
        hook.send(make_alert(step))
    # A second attempt while the first one's answer is still to come: the first was given up.
    deadline = time.monotonic() + 25.0
    while len(server.bodies) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(server.bodies) >= 2
    hook.close(timeout_s=0.0)
    assert "timed out" in caplog.text or "its queue is full" in caplog.text
    assert caplog.messages[-1] == "webhook: 200 of 200 alerts were not delivered"
    assert "do-not-log-me" not in caplog.text


@pytest.mark.parametrize(
    "address", ["", "http://example.com/x", "ftp://localhost/x", "https://", "http://[::1", "x"]
)
def test_addresses_that_alerts_are_not_sent_to(monkeypatch, address):
    monkeypatch.setenv("HOOK", address)
    with pytest.raises(ConfigError, match="environment variable HOOK must hold") as caught:
        read_address("HOOK")
    assert "example" not in str(caught.value)
    for good in ("https://example.com/x", "http://localhost:8/x", "http://[::1]:8/x"):
        monkeypatch.setenv("HOOK", good)
        assert read_address("HOOK") == good
