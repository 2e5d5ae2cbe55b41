"""The Grafana dashboard, made from what is exported (written by `benchmarks/pages.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moepp_megatron.catalogue import METRICS
from moepp_megatron.tools.report.live import prometheus
from moepp_megatron.tools.report.live.prometheus import OF_RECORDS

WIDTH = 24
HEIGHT = 8
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# Grafana's name of a unit of the catalogue.
UNITS = {"share": "percentunit", "s": "s", "bytes": "bytes", "W": "watt", "J": "joule"}
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


def _one(key: str, legend: str) -> Curve:
    return Curve(OF_RECORDS[key].name, legend)


def _own(name: str, width: int = 8, stacked: bool = False) -> Panel:
    """The panel that the catalogue gives a metric."""
    row = METRICS[name]
    assert row.panel is not None, f"{name} has no panel of its own"
    title, legend = row.panel
    if row.prometheus:
        curve = Curve(row.prometheus, legend)
    else:
        curve = Curve(OF_RECORDS["router_health"].name, legend, labels=f'metric="{name}"')
    unit = UNITS.get(row.unit, "none")
    return Panel(title, width, unit, (curve,), stacked=stacked)


PANELS = (
    Panel(
        "State",
        6,
        "none",
        (Curve(prometheus.STATE.name, "{{state}}", "== 1"),),
        kind="stat",
        text="name",
    ),
    Panel("Step", 6, "none", (_one("step", "step"),), kind="stat"),
    Panel("Last record", 6, "s", (Curve(prometheus.RECORD_AGE.name, "age"),), kind="stat"),
    Panel(
        "Alerts",
        6,
        "none",
        (Curve(prometheus.ALERTS.name, "{{rule}} {{severity}}"),),
        kind="stat",
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
            Curve(prometheus.PHI.name, "phi"),
        ),
    ),
    _own("layer_ffn_fraction", width=12),
    _own("expert_share", width=12, stacked=True),
    _own("layer_expert_share", width=12),
    _own("layer_ffn_histogram", width=12),
    _own("gate_entropy"),
    _own("selection_margin"),
    _own("logit_variance"),
    _own("residual_ratio"),
    _own("row_cosine_max"),
    _own("loss_by_ffn"),
    _own("tokens_per_s"),
    _own("step_time_s"),
    Panel("MFU", 8, "percentunit", (_one("mfu", "MFU"), _one("gpu_utilization", "busy"))),
    _own("grad_norm"),
    _own("gpu_power_w"),
    _own("energy_per_token_j"),
    _own("max_ffn_load"),
    _own("a2a_bytes"),
    Panel(
        "Waiting and dropped",
        8,
        "percentunit",
        (_one("waiting_fraction", "waiting"), _one("dropped_fraction", "dropped")),
    ),
)


def _panels() -> list[Panel]:
    """`PANELS`, and behind them those that only the catalogue has."""
    titles = {panel.title for panel in PANELS}
    own = [name for name, row in METRICS.items() if row.panel and row.panel[0] not in titles]
    return [*PANELS, *map(_own, own)]


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
    state = prometheus.STATE.name
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
    for number, panel in enumerate(_panels(), start=1):
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
