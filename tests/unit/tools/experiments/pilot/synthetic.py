"""Runs that never ran, with the losses and step times that a test wants."""

from pathlib import Path
from typing import Any

from moepp_megatron.config import Config, parse_config
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.tools.experiments.pilot.outcome import RunOutcome
from moepp_megatron.tools.experiments.pilot.result import Curve
from moepp_megatron.tools.experiments.pilot.trials import PilotRun
from tests.parallel.training_runs import settings


def config_of(**moe: Any) -> Config:
    return parse_config(
        settings(
            run={"name": "tiny"},
            model={"num_layers": 2, "seq_length": 20},
            moe={"balance_coeff": 0.08, **moe},
            optimizer={"warmup_iters": 15},
            training={"train_iters": 120, "global_batch_size": 4, "micro_batch_size": 1},
        )
    )


def outcome(loss: float, time: float) -> RunOutcome:
    return RunOutcome(
        valid_loss=loss,
        step_time_s=time,
        ffn_share=0.6,
        curve=Curve(tokens=[100], loss=[loss]),
    )


def seeds(losses: list[float], times: list[float]) -> dict[int, RunOutcome]:
    return dict(enumerate(map(outcome, losses, times), start=1))


def record(step: int, **values: Any) -> StepMetrics:
    content = {
        "step": step,
        "tokens": 80 * step,
        "loss": 5.0 - 0.1 * step,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "step_time_s": 0.5,
        "tokens_per_s": 160.0,
        "balance_loss": 1.0,
        "ffn_fraction": 0.6,
        "ffn_per_token": 1.2,
        "expert_share": [0.075] * 8 + [0.1] * 4,
        "max_ffn_load": 1.0,
        "dropped_fraction": 0.0,
        "a2a_bytes": 1000,
        "layer_expert_share": [[0.02] * 4 + [0.13] * 4 + [0.1] * 4] * 2,
        **values,
    }
    return StepMetrics.model_validate(content)


def write_run(
    run: PilotRun, steps: int | None = None, loss: float | None = 4.0, **values: Any
) -> None:
    """The folder that `moepp train` leaves behind; cut off after `steps`."""
    folder, last = run.config.run.dir, run.arm.steps
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(run.config.to_yaml("moepp_megatron"))
    lines = [record(step, **values) for step in range(1, (steps or last) + 1)]
    if steps is None:
        lines[-1] = lines[-1].model_copy(update={"valid_loss": loss})
    Path(folder / "metrics.jsonl").write_text("".join(line.to_json_line() for line in lines))
