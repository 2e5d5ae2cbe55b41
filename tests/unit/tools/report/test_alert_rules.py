"""The alert rules beside the dashboard."""

import re
import shutil

import pytest
import yaml

from moepp_megatron.config.schema import ResilienceSection
from moepp_megatron.features.guard.settings import DEFAULT_RULES
from moepp_megatron.tools.report.live import prometheus
from moepp_megatron.tools.report.live.run import STATES
from tests import ROOT
from tests.commands import captured, succeeded

FILE = ROOT / "docs/grafana/alerts.yaml"
LABELS = {
    metric.name: {"run", *metric.labels.split(",")}
    for metric in (
        *prometheus.OF_RECORDS.values(),
        *prometheus.OF_RUN,
        prometheus.OTHER,
        prometheus.MIN_FFN_LOAD,
    )
}
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool (apt-get install promtool)"
)


(GROUP,) = yaml.safe_load(FILE.read_text())["groups"]
RULES = {rule["alert"]: rule for rule in GROUP["rules"]}


def test_limits_are_the_guards_defaults():
    guard = {rule.name: rule for rule in DEFAULT_RULES}
    far = 1 - guard["few_ffn_experts"].clear
    for name, limits in {
        "MoeppFfnShareFarFromTarget": [f"> {far:g}"],
        "MoeppLogitsExplode": [f"> {guard['logit_explosion'].above:g}"],
        "MoeppSlowRank": [f"> {ResilienceSection().straggler_threshold:g}"],
    }.items():
        assert all(limit in RULES[name]["expr"] for limit in limits), name


def test_the_rules_ask_for_what_is_exported():
    assert len(RULES) == len(GROUP["rules"]) > 12
    for rule in GROUP["rules"]:
        asked = set(re.findall(r"moepp_\w+", rule["expr"]))
        assert asked, rule["alert"]
        assert asked <= LABELS.keys()
        known = set().union(*(LABELS[name] for name in asked)) | {"job", "instance"}
        assert set(re.findall(r'(\w+)="', rule["expr"])) <= known
        texts = " ".join(rule["annotations"].values())
        assert set(re.findall(r"\$labels\.(\w+)", texts)) <= known
        assert set(re.findall(r'state="(\w+)"', rule["expr"])) <= set(STATES)


GOOD = {
    "loss": "3",
    "ffn_ratio": "0.5",
    "phi_ratio": "0.6",
    'layer_min_ffn_load_ratio{layer="2"}': "0.3",
    'router_health{layer="2",metric="logit_variance"}': "2",
    "dropped_ratio": "0",
    "routing_shift": "0.5",
    "failed_saves": "0",
    "tokens_per_second": "1000",
    "slowest_rank_ratio": "1.1",
    "gpu_temperature_celsius": "60",
    'run_state{state="running"}': "1",
    'alerts{rule="collapse",severity="critical"}': "2",
    'alerts{rule="dead_expert",severity="warning"}': "1",
}
# Something that is wrong, the series that say so (else as above), and the alerts. `_` is no sample;
# 8 h of samples, one a minute.
WRONG = {
    "MoeppRunDied": {'run_state{state="running"}': "0", 'run_state{state="died"}': "1"},
    "MoeppRunSilent": {'run_state{state="running"}': "0", 'run_state{state="silent"}': "1"},
    "MoeppLossNotFinite": {"loss": "NaN"},
    "MoeppLogitsExplode": {'router_health{layer="2",metric="logit_variance"}': "200"},
    "MoeppFfnShareFarFromTarget": {"ffn_ratio": "0.44"},
    # A few tokens come now and then.
    "MoeppDeadExpert": {'layer_min_ffn_load_ratio{layer="2"}': " ".join(["0 0 0 0 0.3"] * 96)},
    "MoeppSelectionsDropped": {"dropped_ratio": "0.1"},
    "MoeppDataShift": {"loss_shift": "0.2", "token_shift": "1.5"},
    "MoeppSaveFailed": {"failed_saves": "0x440 1x40"},
    "MoeppStepsSkipped": {"skipped_steps": "_x440 2x40"},
    "MoeppGuardActs": {"guard_actions": "_x440 2x40"},
    "MoeppCriticalAlert": {'alerts{rule="new",severity="critical"}': "_x475 1x5"},
    "MoeppSlow": {"tokens_per_second": "1000x440 500x40"},
    "MoeppSlowRank": {"slowest_rank_ratio": "2"},
    "MoeppGpuHot": {"gpu_temperature_celsius": "90"},
}
FINE = {
    "budget": {"ffn_ratio": "0.3", "ffn_target_ratio": "0.3"},
    "old": {"failed_saves": "2", "skipped_steps": "3"},
    "idle half of the time": {'layer_min_ffn_load_ratio{layer="2"}': " ".join(["0 0.3"] * 240)},
    "over": {'run_state{state="running"}': "0", "failed_saves": "_x470 2x10"},
    "resumed": {"failed_saves": "5x460 0x20"},
}


def _series(run, changes):
    rows = []
    for name, values in (GOOD | changes).items():
        metric, _, labels = name.partition("{")
        inner = f'run="{run}",instance="host",job="moepp",{labels.rstrip("}")}'.rstrip(",")
        if "x" not in values and " " not in values:
            # promtool repeats numbers only.
            values = " ".join(["NaN"] * 481) if values == "NaN" else f"{values}x480"
        rows.append({"series": f"moepp_{metric}{{{inner}}}", "values": values})
    return rows


@needs_promtool
def test_each_rule_fires_for_what_is_wrong_only(tmp_path):
    assert WRONG.keys() | {"MoeppNothingServed"} == RULES.keys()
    firing = 'count by (alertname, run) (ALERTS{alertstate="firing"})'
    expected = [{"labels": f'{{alertname="{name}",run="{name}"}}', "value": 1} for name in WRONG]
    series = [row for run, changes in (WRONG | FINE).items() for row in _series(run, changes)]
    tests = {
        "rule_files": [str(FILE)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": series,
                "promql_expr_test": [
                    {"expr": firing, "eval_time": "480m", "exp_samples": expected}
                ],
            },
            {
                "interval": "1m",
                "input_series": [],
                "promql_expr_test": [
                    {
                        "expr": firing,
                        "eval_time": "10m",
                        "exp_samples": [{"labels": '{alertname="MoeppNothingServed"}', "value": 1}],
                    }
                ],
            },
        ],
    }
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(tests))
    for command in (["check", "rules", str(FILE)], ["test", "rules", str(tmp_path / "tests.yaml")]):
        succeeded(captured(["promtool", *command]))
