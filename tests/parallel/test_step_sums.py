"""The one read of a step: what it holds is what megatron-core's own reads would say."""

import os
import signal

import pytest

from tests.parallel.checkpoint_runs import trainer_settings
from tests.parallel.training_runs import EP2, begin, short, with_first_part


def norms(raw, steps):
    """The gradient norm as read with all else, and by megatron-core's own function."""
    from moepp_megatron.training import step as step_module
    from tests.parallel.training_runs import train

    found, prepare = [], step_module.prepare_gradients

    def prepared(optimizer):
        result = prepare(optimizer)
        found.append(float(optimizer.get_grad_norm()))
        return result

    step_module.prepare_gradients = prepared
    try:
        run, _ = train(raw, steps)
    finally:
        step_module.prepare_gradients = prepare
    return list(zip(run.grad_norms, found, strict=True))


@pytest.mark.parametrize("is_distributed", [True, False])
def test_gradient_norm_has_the_bits_of_megatron_core(ranks, is_distributed):
    """One norm over all ranks, or, not distributed, one of experts and one of the rest."""
    parallel = {**EP2, "use_distributed_optimizer": is_distributed, "overlap_param_gather": False}
    for pairs in ranks(2).run(norms, short(parallel=parallel), 2):
        assert len(pairs) == 2
        assert all(ours == theirs > 0 for ours, theirs in pairs)


def stopped_at(raw, step_of_signal):
    """The step after which a run ends whose rank 1 gets a signal within `step_of_signal`."""
    import torch.distributed as dist

    from moepp_megatron.training.part import Part
    from moepp_megatron.training.trainer import Trainer

    config, layout = begin(raw)
    trainer = Trainer(config, layout)

    class Signal(Part):
        def begin_step(self, step, layout):
            if step == step_of_signal and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    with_first_part(trainer, Signal())
    trainer.run()
    assert trainer.stopped
    return trainer.progress.step


def test_request_stops_a_step_that_is_not_logged(ranks, corpus, tmp_path):
    raw = trainer_settings(corpus, tmp_path / "run", training={"log_interval": 10})
    assert ranks(2).run(stopped_at, raw, 2) == [2, 2]
