"""The numbers that Prometheus gets, and the dashboard and table that name them."""

import json
import math
import re
import socket
import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import pages
from moepp_megatron.observe.alert_sinks import _AlertFile
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.tools.report.live.prometheus import (
    MIN_FFN_LOAD,
    OF_RECORDS,
    OF_RUN,
    OTHER,
    LiveRuns,
    is_open,
    serve,
)
from tests.refusals import config_error
from tests.unit.tools.report.conftest import alert, append, records_of

EXPORTED = {metric.name for metric in (*OF_RECORDS.values(), *OF_RUN, OTHER, MIN_FFN_LOAD)}


@pytest.fixture
def scrape():
    """Serves a run and returns a function that asks for its metrics."""

    def start(run, clock=time.time):
        address = serve(LiveRuns([run], clock), 0)

        def get():
            with urllib.request.urlopen(address, timeout=30) as answer:
                families = list(text_string_to_metric_families(answer.read().decode()))
            names = {sample.labels.pop("run") for family in families for sample in family.samples}
            assert names == {run.name}
            return {
                # By the labels' values, labels in the order of their names.
                family.name: {tuple(s.labels.values()): s.value for s in family.samples}
                for family in families
            }

        get.address = address
        return get

    return start


def test_the_newest_record_is_served(make_run, scrape):
    def edit(records):
        records[-1]["own_key"] = 3.0
        # Of a number that is not in every record the last one counts.
        records[-2]["layer_ffn_histogram"] = [[0.5, 0.25, 0.25]] * 4
        records[-2]["router_health"] = {"gate_entropy": [1.0, 1.1, 1.2, None]}
        records[-2]["loss_by_ffn"] = [3.0, 2.5, None]

    run = make_run(steps=5, edit=edit)
    _AlertFile(run / "alerts.jsonl").send(alert(1, rule="collapse", severity="critical"))
    get = scrape(run)
    got = get()
    record = records_of(run)[-1]
    assert set(got) <= EXPORTED
    assert got["moepp_loss"] == {(): pytest.approx(record["loss"])}
    assert got["moepp_step"] == {(): 5}
    assert got["moepp_phi_ratio"] == {(): pytest.approx(0.6)}
    assert got["moepp_run_info"] == {("quickstart",): 1}
    assert got["moepp_run_state"][("running",)] == 1
    assert sum(got["moepp_run_state"].values()) == 1
    assert got["moepp_record_age_seconds"][()] >= 0
    assert got["moepp_other"] == {("own_key",): 3.0}
    assert got["moepp_alerts"] == {("collapse", "critical"): 1}
    assert got["moepp_expert_share_ratio"][("FFN 0", "FFN")] == record["expert_share"][0]
    layer = record["layer_expert_share"][1]
    constant = got["moepp_layer_share_ratio"][("constant", "2")]
    assert constant == pytest.approx(layer[8] + layer[9])
    ffn = layer[:8]
    assert got["moepp_layer_min_ffn_load_ratio"][("2",)] == pytest.approx(min(ffn) / sum(ffn) * 8)
    assert got["moepp_layer_ffn_ratio"][("4",)] == record["layer_ffn_fraction"][3]
    assert got["moepp_layer_tokens_ratio"][("0", "1")] == 0.5
    health = got["moepp_router_health"]
    assert health[("2", "gate_entropy")] == 1.1
    assert math.isnan(health[("4", "gate_entropy")])
    assert got["moepp_loss_by_ffn"][("1",)] == 2.5

    append(run, record | {"step": 6, "loss": None, "valid_loss": None})
    again = get()
    assert again["moepp_step"] == {(): 6}
    assert again["moepp_loss"][()] != again["moepp_loss"][()], "NaN"
    assert again["moepp_valid_loss"] == got["moepp_valid_loss"]


def test_a_run_that_stands_still_keeps_state_and_age_only(make_run, scrape):
    got = scrape(make_run(steps=5), clock=lambda: time.time() + 3600.0)()
    assert got["moepp_run_state"][("silent",)] == 1
    assert got["moepp_record_age_seconds"][()] >= 3600.0
    assert "moepp_loss" not in got


def test_a_run_that_has_not_begun(tmp_path, scrape):
    got = scrape(tmp_path)()
    assert set(got) == {"moepp_run_state", "moepp_alerts"}
    assert got["moepp_run_state"][("waiting",)] == 1


def test_only_this_machine_can_ask(tmp_path, scrape):
    get = scrape(tmp_path)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/metrics", get.address)
    port = int(get.address.split(":")[2].split("/")[0])
    # Another address of this very machine, all of 127/8 being its own.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=10)


def test_a_port_in_use_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with config_error(rf"--prometheus \({port}\) must be a free port"):
            serve(LiveRuns([tmp_path]), port)


def test_every_number_of_a_record_has_a_name_of_its_own():
    assert set(OF_RECORDS) - {"layer_ffn_histogram"} <= set(StepMetrics.model_fields)
    assert set(StepMetrics.model_fields) <= set(OF_RECORDS)
    names = [metric.name for metric in OF_RECORDS.values()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"moepp_[a-z0-9_]+", name) for name in names)


def test_the_dashboard_asks_for_what_is_exported():
    file = json.loads(pages.grafana())
    queries = [target["expr"] for panel in file["panels"] for target in panel["targets"]]
    assert all('instance="$instance",run="$run"' in query for query in queries)
    choices = {one["name"]: one["query"] for one in file["templating"]["list"]}
    assert list(choices) == ["datasource", "instance", "run"]
    queries += [choices["instance"]["query"], choices["run"]["query"]]
    asked = {name for query in queries for name in re.findall(r"moepp_\w+", query)}
    assert len(asked) > 15
    assert asked <= EXPORTED
    places = [panel["gridPos"] for panel in file["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    corners = {(place["x"], place["y"]) for place in places}
    assert len(corners) == len(places)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", False), ("127.8.8.8", False), ("::1", False), ("localhost", False)]
    + [("0.0.0.0", True), ("::", True), ("10.0.0.1", True), ("node7", True)],
)
def test_which_addresses_are_open_to_others(host, expected):
    assert is_open(host) == expected
