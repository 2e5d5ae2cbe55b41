"""Records and alerts to write."""

import json

import pytest

from moepp_megatron.experts import ExpertCounts
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.metrics import StepMetrics

EXPERTS = ExpertCounts(2, num_constant_experts=1, num_copy_experts=0, num_zero_experts=1)


@pytest.fixture
def path(tmp_path):
    """A file of records that is not there yet."""
    return tmp_path / "metrics.jsonl"


def make_record(step=1, **changes):
    """A record of one step of a layer with 2 FFN and 2 zero-computation experts."""
    values = {
        "step": step,
        "tokens": 512 * step,
        "loss": 5.25,
        "lr": 3e-4,
        "grad_norm": 1.5,
        "step_time_s": 0.5,
        "tokens_per_s": 1024.0,
        "balance_loss": 1.0,
        "ffn_fraction": 0.625,
        "ffn_per_token": 1.25,
        "expert_share": [0.3125, 0.3125, 0.25, 0.125],
        "max_ffn_load": 1.0,
        "dropped_fraction": 0.0,
        "a2a_bytes": 4096,
    }
    return StepMetrics(**(values | changes))


def lines_of(*steps):
    """The text of the records of some steps."""
    return "".join(make_record(step).to_json_line() for step in steps)


def write_steps(sink, *steps, **changes):
    for step in steps:
        sink.write(make_record(step, **changes))


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def make_alert(step=7, **changes):
    values = {
        "step": step,
        "time": 1.5e9,
        "rule": "dead_expert",
        "metric": "expert_share",
        "value": 0.0,
        "condition": "== 0 for 50 steps",
        "severity": "warning",
        "action": "warn",
    }
    return Alert(**(values | changes))
