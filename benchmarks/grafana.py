"""The Grafana dashboard, made from what is exported.

``python -m benchmarks.grafana > docs/grafana/moepp.json`` writes it anew.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from moepp_megatron.workbench.report.live import exported
from moepp_megatron.workbench.report.live.exported import OF_RECORDS

WIDTH = 24
HEIGHT = 8
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# A monitor is one scraped port, and serves one run or many.
OF_ONE_RUN = 'instance="$instance",run="$run"'


@dataclass(frozen=True)
class Curve:
    """One query of a panel.

    Attributes:
        metric: Name at Prometheus.
        legend: Name in the panel; ``{{label}}`` is filled in.
        condition: Which values are shown, as PromQL.
        labels: Further labels that are asked for, as PromQL.
    """

    metric: str
    legend: str
    condition: str = ""
    labels: str = ""

    @property
    def query(self) -> str:
        """PromQL."""
        labels = ",".join(filter(None, (OF_ONE_RUN, self.labels)))
        return f"{self.metric}{{{labels}}} {self.condition}".rstrip()


@dataclass(frozen=True)
class Panel:
    """One panel: its title, width in 24ths of a row, unit of Grafana, and curves.

    ``kind`` is Grafana's type of panel, ``text`` what a single number shows.
    """

    title: str
    width: int
    unit: str
    curves: tuple[Curve, ...]
    kind: str = "timeseries"
    stacked: bool = False
    text: str = "auto"


def _one(key: str, legend: str = "") -> Curve:
    metric = OF_RECORDS[key]
    return Curve(metric.name, legend or metric.meaning)


def _health(name: str) -> Curve:
    return Curve(OF_RECORDS["router_health"].name, "layer {{layer}}", labels=f'metric="{name}"')


PANELS = (
    Panel(
        "State", 6, "none", (Curve(exported.STATE.name, "{{state}}", "== 1"),), kind="stat",
        text="name",
    ),
    Panel("Step", 6, "none", (_one("step", "step"),), kind="stat"),
    Panel(
        "Last record", 6, "s", (Curve(exported.RECORD_AGE.name, "age"),), kind="stat"
    ),
    Panel(
        "Alerts", 6, "none", (Curve(exported.ALERTS.name, "{{rule}} {{severity}}"),), kind="stat",
        text="value_and_name",
    ),
    Panel("Loss", 12, "none", (_one("loss", "train"), _one("valid_loss", "validation"))),
    Panel(
        "FFN share of all selections",
        12,
        "percentunit",
        (
            _one("ffn_fraction", "measured"),
            _one("ffn_target", "target"),
            Curve(exported.PHI.name, "phi"),
        ),
    ),
    Panel(
        "FFN share of each MoE layer", 12, "percentunit",
        (_one("layer_ffn_fraction", "layer {{layer}}"),),
    ),
    Panel(
        "Share of each expert", 12, "percentunit", (_one("expert_share", "{{expert}}"),),
        stacked=True,
    ),
    Panel(
        "Share of each kind, by layer", 12, "percentunit",
        (_one("layer_expert_share", "layer {{layer}} {{kind}}"),),
    ),
    Panel(
        "FFN experts of a token, by layer", 12, "percentunit",
        (_one("layer_ffn_histogram", "layer {{layer}}: {{ffn_experts}}"),),
    ),
    Panel("Entropy of the gates, nats", 8, "none", (_health("gate_entropy"),)),
    Panel("Margin of the selection", 8, "none", (_health("selection_margin"),)),
    Panel("Variance of the logits", 8, "none", (_health("logit_variance"),)),
    Panel("Residual over the router's own logits", 8, "none", (_health("residual_ratio"),)),
    Panel("Likeness of the router's rows, cosine", 8, "none", (_health("row_cosine_max"),)),
    Panel(
        "Loss of tokens by FFN experts taken", 8, "none",
        (_one("loss_by_ffn", "{{ffn_experts}} FFN experts"),),
    ),
    Panel("Throughput", 8, "none", (_one("tokens_per_s", "tokens/s"),)),
    Panel("Step time", 8, "s", (_one("step_time_s", "step"),)),
    Panel("MFU", 8, "percentunit", (_one("mfu", "MFU"), _one("gpu_utilization", "busy"))),
    Panel("Gradient norm", 8, "none", (_one("grad_norm", "before clipping"),)),
    Panel("Power of a card", 8, "watt", (_one("gpu_power_w", "mean"),)),
    Panel("Energy a token", 8, "joule", (_one("energy_per_token_j", "cards"),)),
    Panel("Busiest FFN expert over the mean", 8, "none", (_one("max_ffn_load", "load"),)),
    Panel("All-to-all", 8, "bytes", (_one("a2a_bytes", "a step, forward"),)),
    Panel(
        "Waiting and dropped", 8, "percentunit",
        (_one("waiting_fraction", "waiting"), _one("dropped_fraction", "dropped")),
    ),
)  # fmt: skip


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it; it asks for the Prometheus source."""
    return {
        "title": "MoE++ training run",
        "uid": "moepp-run",
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "tags": ["moepp"],
        "templating": {"list": [_datasource(), *_choices()]},
        "panels": _placed(),
    }


def _datasource() -> dict[str, Any]:
    return {
        "name": "datasource",
        "type": "datasource",
        "query": "prometheus",
        "label": "Prometheus",
    }


def _choices() -> list[dict[str, Any]]:
    """The monitor, and the run among those that it serves."""
    state = exported.STATE.name
    return [
        _choice("instance", f"label_values({state}, instance)", "Monitor"),
        _choice("run", f'label_values({state}{{instance="$instance"}}, run)', "Run"),
    ]


def _choice(name: str, query: str, label: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "label": label,
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": f"{name}s"},
        "definition": query,
        # Asked again whenever the range of time changes: runs come and go.
        "refresh": 2,
        "sort": 1,
        "multi": False,
        "includeAll": False,
    }


def _placed() -> list[dict[str, Any]]:
    """The panels, row after row."""
    placed, x, y = [], 0, 0
    for number, panel in enumerate(PANELS, start=1):
        if x + panel.width > WIDTH:
            x, y = 0, y + HEIGHT
        position = {"x": x, "y": y, "w": panel.width, "h": HEIGHT}
        placed.append(_panel(number, panel, position))
        x += panel.width
    return placed


def _panel(number: int, panel: Panel, position: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none"}
        fill = 60 if panel.stacked else 0
        defaults["custom"] = {"stacking": stacking, "fillOpacity": fill, "spanNulls": False}
    options: dict[str, Any] = {}
    if panel.kind == "stat":
        options = {"textMode": panel.text, "reduceOptions": {"calcs": ["lastNotNull"]}}
    return {
        "id": number,
        "title": panel.title,
        "type": panel.kind,
        "datasource": DATASOURCE,
        "gridPos": position,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": DATASOURCE,
                "expr": curve.query,
                "legendFormat": curve.legend,
            }
            for i, curve in enumerate(panel.curves)
        ],
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2))
