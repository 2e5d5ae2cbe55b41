"""Runs that never ran, with the losses and step times that a test wants."""

from pathlib import Path

from moepp_megatron.config import parse_config
from moepp_megatron.tools.experiments.pilot.arms import PilotRun
from moepp_megatron.tools.experiments.pilot.pilot import Pilot
from tests.parallel.training_runs import settings
from tests.unit.observe.conftest import make_record


def config_of(**moe):
    return parse_config(
        settings(
            run={"name": "tiny"},
            model={"num_layers": 2, "seq_length": 20},
            moe={"balance_coeff": 0.08, **moe},
            optimizer={"warmup_iters": 15},
            training={"train_iters": 120, "global_batch_size": 4, "micro_batch_size": 1},
        )
    )


def record(step, **values):
    content = {
        "tokens": 80 * step,
        "loss": 5.0 - 0.1 * step,
        "ffn_fraction": 0.6,
        "ffn_per_token": 1.2,
        "expert_share": [0.075] * 8 + [0.1] * 4,
        "layer_expert_share": [[0.02] * 4 + [0.13] * 4 + [0.1] * 4] * 2,
        **values,
    }
    return make_record(step, **content)


def pilot_in(path, seeds, config=None, steps=8):
    """A pilot of one rank a run whose folder has been made."""
    config = config_of() if config is None else config
    pilot = Pilot(path, 1, config, steps, range(7, 7 + seeds), "moepp pilot")
    pilot.claim()
    return pilot


def run_in(path, arm, seed=7, nproc=1):
    return PilotRun.of(path, nproc, arm, seed)


def write_run(config, steps=None, loss=4.0, **values):
    """The folder that `moepp train` leaves behind; cut off after `steps`."""
    folder, last = config.run.dir, config.training.train_iters
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml("moepp_megatron"))
    lines = [record(step, **values) for step in range(1, (steps or last) + 1)]
    if steps is None:
        lines[-1] = lines[-1].model_copy(update={"valid_loss": loss})
    Path(folder / "metrics.jsonl").write_text("".join(line.to_json_line() for line in lines))
