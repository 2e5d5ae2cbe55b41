"""A synthetic run with the shape of a real one."""

import base64
import json
import math

import numpy as np
import pytest
import yaml

from moepp_megatron.experts import ExpertCounts
from tests.parallel.training_runs import merged
from tests.unit.observe.conftest import make_alert

CONFIG = {
    "run": {"name": "quickstart", "dir": "runs/quickstart"},
    "model": {
        "num_layers": 4,
        "hidden_size": 128,
        "ffn_hidden_size": 256,
        "num_attention_heads": 4,
        "seq_length": 128,
        "vocab_size": 4096,
    },
    "moe": {
        "num_ffn_experts": 8,
        "num_zero_experts": 1,
        "num_copy_experts": 1,
        "num_constant_experts": 2,
        "router_topk": 2,
        "tau": 0.75,
        "gating_residual": True,
        "layer_freq": 1,
    },
    "parallel": {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 1},
    "precision": {"dtype": "fp32", "fp8": None},
    "optimizer": {"lr": 1e-3, "min_lr": 1e-4},
    "training": {"train_iters": 300, "global_batch_size": 16, "micro_batch_size": 4},
}


def synthetic_config(**sections):
    """The configuration with some keys replaced, by section."""
    return merged(CONFIG, sections)


def synthetic_records(config, steps):
    """Records of a run that learns, and whose FFN share settles near phi."""
    rng = np.random.default_rng(7)
    model, moe = config["model"], config["moe"]
    experts = ExpertCounts(**{key: moe[key] for key in moe if key.endswith("_experts")})
    ffn, others = experts.num_ffn_experts, experts.num_zero_computation_experts
    start, phi = experts.phi(1.0), experts.phi(moe["tau"])
    tokens_per_step = config["training"]["global_batch_size"] * model["seq_length"]
    lean = rng.normal(0, 0.15, (model["num_layers"], ffn + others))
    records = []
    for step in range(1, steps + 1):
        settled = 1 - math.exp(-step / 40)
        share = start + (phi - start) * settled
        level = np.concatenate(
            [np.full(ffn, share / ffn), np.full(others, (1 - share) / max(1, others))]
        )
        layers = level * np.exp(lean * (1.5 - settled) + rng.normal(0, 0.04, lean.shape))
        layers /= layers.sum(axis=1, keepdims=True)
        mean = layers.mean(axis=0)
        fraction = float(mean[:ffn].sum())
        step_time = 0.42 + 0.6 * (step == 1) + float(rng.gamma(2, 0.01))
        loss = 3.4 + (math.log(model["vocab_size"]) - 3.4) * math.exp(-step / 70)
        warm = min(1.0, step / 20)
        selections = tokens_per_step * moe["router_topk"] * model["num_layers"]
        record = {
            "step": step,
            "tokens": step * tokens_per_step,
            "loss": loss + float(rng.normal(0, 0.06)),
            "lr": warm * (1e-4 + 4.5e-4 * (1 + math.cos(math.pi * step / steps))),
            "grad_norm": 0.5 + 3 * math.exp(-step / 20) + float(rng.gamma(2, 0.05)),
            "step_time_s": step_time,
            "tokens_per_s": tokens_per_step / step_time,
            "balance_loss": 0.9 + 0.3 * math.exp(-step / 30) + float(rng.normal(0, 0.01)),
            "ffn_fraction": fraction,
            "ffn_per_token": fraction * moe["router_topk"],
            "expert_share": mean.tolist(),
            "max_ffn_load": float(mean[:ffn].max() / mean[:ffn].mean()),
            "dropped_fraction": 0.0,
            "a2a_bytes": round(selections * fraction * model["hidden_size"] * 4 * 2 * 0.5),
            "layer_expert_share": layers.tolist(),
            "layer_ffn_fraction": layers[:, :ffn].sum(axis=1).tolist(),
        }
        if step % 50 == 0 or step == steps:
            record["valid_loss"] = loss + 0.05
        records.append(record)
    return records


def add_health(records, every=10):
    """Adds the fields of steps in which router health was measured."""
    rng = np.random.default_rng(11)
    for record in records[every - 1 :: every]:
        layers = len(record["layer_ffn_fraction"])
        topk = round(record["ffn_per_token"] / record["ffn_fraction"])
        record |= _health(rng, layers, topk, record["loss"])


def _health(rng, layers, topk, loss):
    level = {
        "gate_entropy": 1.9,
        "selection_margin": 0.05,
        "logit_variance": 1.5,
        "own_logit_variance": 1.2,
        "residual_ratio": 0.4,
        "row_cosine": 0.1,
        "row_cosine_max": 0.5,
        "balance_gradient_ratio": 0.3,
        "constant_replaced": 0.5,
        "constant_norm": 2.0,
    }
    spread = {name: value * rng.uniform(0.8, 1.2, layers) for name, value in level.items()}
    spread["residual_ratio"][0] = 0.0
    histogram = rng.dirichlet(np.full(topk + 1, 20.0), layers)
    return {
        "router_health": {name: values.tolist() for name, values in spread.items()},
        "layer_ffn_histogram": histogram.tolist(),
        "loss_by_ffn": [loss - 0.3 + 0.3 * count for count in range(topk + 1)],
    }


def alert(step, **changes):
    """A warning of a rule about the third layer, with some fields changed."""
    fields = {
        "time": 1.7e9 + step,
        "metric": "min_ffn_load",
        "value": 0.0041234,
        "condition": "< 0.01 for 100 steps",
        "layer": 3,
    }
    return make_alert(step, **fields | changes)


def records_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def append(run, *records):
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def svg_of(address):
    """The content of a picture in a page."""
    return base64.b64decode(address.partition(",")[2]).decode()


def write_run(folder, config, records):
    """Writes the two files that a report is made of."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)
    return folder


@pytest.fixture
def make_run(tmp_path):
    """Writes a synthetic run; all records get what is in ``each``, and ``edit`` may change them."""

    def make(steps=60, edit=None, each=None, **sections):
        config = synthetic_config(**sections)
        records = [record | (each or {}) for record in synthetic_records(config, steps)]
        if edit is not None:
            edit(records)
        return write_run(tmp_path / "run", config, records)

    return make


@pytest.fixture(scope="session")
def full_run(tmp_path_factory):
    """A finished run of 60 steps with its page, for tests that only read."""
    from moepp_megatron.tools.report.page import build_report

    config = synthetic_config()
    records = synthetic_records(config, 60)
    add_health(records)
    run = write_run(tmp_path_factory.mktemp("full"), config, records)
    build_report(run)
    return run
