"""A log has the steps that `training.log_interval` asks for, from the trainer to the line."""

import contextlib
import io

from tests.parallel.checkpoint_runs import logged, run_trainer, trainer_settings


def printed_by_trainer(raw):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run_trainer(raw)
    return out.getvalue().splitlines()


def test_every_third_step_and_the_last(on_one_rank, corpus, tmp_path):
    training = {"train_iters": 7, "log_interval": 3, "global_batch_size": 4}
    raw = trainer_settings(corpus, tmp_path / "run", training=training)
    lines = on_one_rank(printed_by_trainer, raw)
    steps = [line.split(" | ")[0] for line in lines if line.startswith("step ")]
    assert steps == ["step 3/7", "step 6/7", "step 7/7"]
    assert logged(tmp_path / "run", "step") == [3, 6, 7]
