"""The alert rules for Prometheus, made from what is exported.

They are written anew by

    python -m moepp_megatron.workbench.report.live.alert_rules > docs/grafana/alerts.yaml
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import yaml

from moepp_megatron.config.guard_rules import DEFAULT_RULES
from moepp_megatron.config.schema import ResilienceSection
from moepp_megatron.workbench.report.live import exported
from moepp_megatron.workbench.report.live.exported import OF_RECORDS

HEADER = """\
# Alert rules for Prometheus; docs/monitor.md says how they are loaded. Made by
# python -m moepp_megatron.workbench.report.live.alert_rules > docs/grafana/alerts.yaml
"""

# What tells the runs of all monitors apart.
RUN = "job, instance, run"


@dataclass(frozen=True)
class AlertRule:
    """One rule.

    Attributes:
        name: Its name at Prometheus.
        query: PromQL; it fires for each series that this returns.
        lasting: How long it must do so, as Prometheus writes times.
        severity: As of the run's own alerts.
        text: What has happened to the run; ``{{ $labels.NAME }}`` and ``{{ $value }}`` are filled
            in.
        remedy: What to look at.
    """

    name: str
    query: str
    lasting: str
    severity: Literal["info", "warning", "critical"]
    text: str
    remedy: str


def _guard(name: str, limit: Literal["above", "below", "clear"]) -> float:
    """A limit of a default rule of the routing guard."""
    value = next(getattr(rule, limit) for rule in DEFAULT_RULES if rule.name == name)
    assert isinstance(value, float), f"{name} has no limit {limit}"
    return value


def _of(key: str) -> str:
    return OF_RECORDS[key].name


def _state(name: str) -> str:
    return f'{exported.STATE.name}{{state="{name}"}} == 1'


def _grown(metric: str, period: str) -> str:
    """Where a count is larger than `period` ago; it may have had no series then."""
    return f"{metric} - ({metric} offset {period} or 0 * {metric}) > 0"


def _while_running(query: str) -> str:
    """Old counts of runs that are over are no news to a Prometheus that has just begun."""
    return f"({query}) and on ({RUN}) ({_state('running')})"


# From where on the guard takes a run with few FFN experts for healthy again.
_FAR = 1 - _guard("few_ffn_experts", "clear")
_MIN_LOAD = _guard("dead_expert", "below")
_MAX_VARIANCE = _guard("logit_explosion", "above")
_SLOW_RANK = ResilienceSection().straggler_threshold
_WANTED = f"({_of('ffn_target')} or {exported.PHI.name})"
_LOSS, _SHARE = _of("loss"), _of("ffn_fraction")
_HEALTH = OF_RECORDS["router_health"].name

RULES = (
    AlertRule(
        "MoeppNothingServed", f"absent({exported.STATE.name})", "5m", "critical",
        "no monitor serves a run",
        "start moepp monitor --prometheus again; look at Prometheus's targets",
    ),
    AlertRule(
        "MoeppRunDied", _state("died"), "1m", "critical",
        "the process of the run is gone and said nothing",
        "look at the end of its log; moepp train ... --resume goes on",
    ),
    AlertRule(
        "MoeppRunSilent", _state("silent"), "1m", "critical",
        "the run has stopped being updated: no record for ten times the usual time",
        "look for a hang (docs/cluster.md), a full disk, a machine that is gone",
    ),
    AlertRule(
        "MoeppLossNotFinite", f"{_LOSS} != {_LOSS} or abs({_LOSS}) == Inf", "0m", "critical",
        "the loss is not finite",
        "go back to an earlier checkpoint; lower the learning rate",
    ),
    AlertRule(
        "MoeppLogitsExplode",
        f'{_HEALTH}{{metric="logit_variance"}} > {_MAX_VARIANCE:g}', "5m", "critical",
        "the router's logits of layer {{ $labels.layer }} have a variance of {{ $value }}",
        "docs/routing.md says what holds them; a z-loss, or moe.logits_norm_std",
    ),
    AlertRule(
        "MoeppFfnShareFarFromTarget",
        f"abs(avg_over_time({_SHARE}[10m]) / {_WANTED} - 1) > {_FAR:g}",
        "30m", "warning",
        "the FFN share is {{ $value | humanizePercentage }} away from what is wanted",
        "moe.balance_coeff, tau or moe.budget (docs/routing.md)",
    ),
    AlertRule(
        "MoeppDeadExpert",
        f"max_over_time({exported.MIN_FFN_LOAD.name}[10m]) < {_MIN_LOAD:g}", "10m", "warning",
        "an FFN expert of layer {{ $labels.layer }} gets no tokens",
        "moe.balance_coeff; the page of the run shows which expert (moepp report)",
    ),
    AlertRule(
        "MoeppSelectionsDropped", f"{_of('dropped_fraction')} > 0.05", "15m", "warning",
        "{{ $value | humanizePercentage }} of the selections are dropped",
        "a larger capacity factor, or a larger moe.balance_coeff",
    ),
    AlertRule(
        "MoeppRoutingShift", f"{_of('routing_shift')} > 1", "10m", "warning",
        "routing has moved {{ $value }} times as far from its reference as it may",
        "have the data changed? (docs/routing_shift.md)",
    ),
    AlertRule(
        "MoeppSaveFailed", _while_running(_grown(_of("failed_saves"), "1h")), "0m", "critical",
        "{{ $value }} checkpoints of the last hour could not be written",
        "room and rights of checkpoint.dir (docs/checkpoints.md)",
    ),
    AlertRule(
        "MoeppStepsSkipped", _while_running(_grown(_of("skipped_steps"), "1h")), "0m", "warning",
        "the numerical guard refused {{ $value }} batches in the last hour",
        "alerts.jsonl says which; a bad document, a card with errors, too high a learning rate",
    ),
    AlertRule(
        "MoeppGuardActs", f"{_of('guard_actions')} > 0", "10m", "warning",
        "the routing guard holds the run in {{ $value }} places",
        "alerts.jsonl says which (docs/guard.md)",
    ),
    AlertRule(
        "MoeppCriticalAlert",
        _while_running(_grown(f'{exported.ALERTS.name}{{severity="critical"}}', "10m")),
        "0m", "critical",
        "the run raised an alert: {{ $labels.rule }}",
        "alerts.jsonl has its words",
    ),
    AlertRule(
        "MoeppSlow",
        f"avg_over_time({_of('tokens_per_s')}[10m]) < "
        f"0.7 * avg_over_time({_of('tokens_per_s')}[6h])",
        "20m", "warning",
        "throughput has fallen to {{ $value }} tokens/s, below 70% of the last 6 hours' mean",
        "a slow rank, a throttled card, a shared disk; moepp profile",
    ),
    AlertRule(
        "MoeppSlowRank", f"{_of('slowest_rank_ratio')} > {_SLOW_RANK:g}", "30m", "warning",
        "the slowest rank takes {{ $value }} times as long as the median",
        "moepp_slowest_rank names it; moepp doctor on its machine",
    ),
    AlertRule(
        "MoeppGpuHot", f"{_of('gpu_temperature_c')} > 85", "5m", "warning",
        "a GPU has {{ $value }} degrees Celsius; from about 87 on it slows down",
        "cooling, the power limit; nvidia-smi -q -d TEMPERATURE shows its limits",
    ),
)  # fmt: skip


def rules() -> dict[str, Any]:
    """The rules as Prometheus reads them."""
    return {"groups": [{"name": "moepp", "rules": [_rule(rule) for rule in RULES]}]}


def text() -> str:
    """The file."""
    return HEADER + yaml.safe_dump(rules(), sort_keys=False, width=100)


def _rule(rule: AlertRule) -> dict[str, Any]:
    who = "" if rule.name == "MoeppNothingServed" else "{{ $labels.run }}: "
    return {
        "alert": rule.name,
        "expr": rule.query,
        "for": rule.lasting,
        "labels": {"severity": rule.severity},
        "annotations": {"summary": who + rule.text, "description": rule.remedy},
    }


if __name__ == "__main__":
    print(text(), end="")
