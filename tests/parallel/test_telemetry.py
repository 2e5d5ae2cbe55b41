"""Records of a run on several ranks carry telemetry; each node is sampled once."""

import pytest

from moepp_megatron.config import parse_config
from moepp_megatron.config.flops import training_flops_per_token
from moepp_megatron.observe.metrics import read_metrics
from tests.parallel.resilience_runs import run_trainer, trainer_settings
from tests.parallel.training_runs import EP2

pytestmark = pytest.mark.parallel


def test_telemetry_stands_beside_every_step(ranks, tmp_path):
    card = tmp_path / "card.yaml"
    card.write_text("name: card\nkind: cpu\nfp32_tflops: 0.5\n")
    raw = trainer_settings(
        tmp_path,
        parallel=EP2,
        training={"train_iters": 2, "global_batch_size": 4, "micro_batch_size": 1},
        optimizer={"warmup_iters": 0},
        telemetry={"interval_s": 1.0, "hardware": str(card)},
    )
    ranks(2).run(run_trainer, raw)
    config = parse_config(raw)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert len(records) == 2
    for record in records:
        flops = training_flops_per_token(config, record.ffn_fraction) * record.tokens_per_s
        assert record.model_tflops == pytest.approx(flops / 2 / 1e12)
        assert record.model_tflops is not None
        assert record.mfu == pytest.approx(record.model_tflops / 0.5)
        assert record.energy_j is None
        assert record.gpu_hours is None
        assert 0.0 <= record.cpu_utilization <= 1.0
        assert record.host_memory_bytes > 2**20


def test_telemetry_can_be_off(ranks, tmp_path):
    raw = trainer_settings(
        tmp_path,
        training={"train_iters": 2, "global_batch_size": 2, "micro_batch_size": 1},
        optimizer={"warmup_iters": 0},
        telemetry={"interval_s": 0.0},
    )
    ranks(2).run(run_trainer, raw)
    for record in read_metrics(tmp_path / "metrics.jsonl"):
        assert (record.model_tflops, record.cpu_utilization) == (None, None)
