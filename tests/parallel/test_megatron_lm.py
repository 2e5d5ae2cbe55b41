"""MoE++ in Megatron-LM's own loop trains to the result of our trainer on one process."""

import pytest

from tests.parallel.megatron_lm_runs import (
    ARGUMENTS,
    SETTINGS,
    STEPS,
    run_script,
    train_in_megatron_lm,
)
from tests.parallel.ranks import RankError
from tests.parallel.training_runs import assemble, compare

# fp32; the same bound as in the layout matrix, whose largest difference is 2.3e-6.
RELATIVE = 1e-5


SPEC = "--spec moepp_megatron.interop.megatron_lm moepp_spec"


@pytest.mark.parallel
@pytest.mark.parametrize(
    ("way", "arguments"),
    [
        pytest.param("spec", f"--expert-model-parallel-size 2 {SPEC}", id="spec, ep 2"),
        pytest.param(
            "config",
            "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2",
            id="config, tp 2, ep 2",
        ),
        pytest.param(
            "config", "--context-parallel-size 2 --cp-comm-type all_gather", id="config, cp 2"
        ),
        pytest.param("provider", "--pipeline-model-parallel-size 2", id="provider, pp 2"),
        pytest.param(
            "config",
            "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
            "--decoder-first-pipeline-num-layers 2",
            id="config, pp 2, vpp 2, layers of the first stage",
        ),
    ],
)
def test_equals_our_trainer(ranks, alone, tmp_path, way, arguments):
    results = ranks(2).run(train_in_megatron_lm, arguments, way, str(tmp_path))
    compare(assemble(results), alone(SETTINGS, steps=STEPS), RELATIVE)


@pytest.mark.parallel
def test_bf16_crosses_stages(ranks, tmp_path):
    alone, staged = (
        assemble(ranks(n).run(train_in_megatron_lm, arguments, "config", str(tmp_path / str(n))))
        for n, arguments in ((1, "--bf16"), (2, "--bf16 --pipeline-model-parallel-size 2"))
    )
    # Nothing is rounded between stages, and they change no sum but that of the gradient norm.
    assert staged.losses == alone.losses
    compare(staged, alone, RELATIVE)


@pytest.mark.parallel
def test_spec_refuses_a_gating_residual_across_stages(ranks, tmp_path):
    arguments = f"--pipeline-model-parallel-size 2 {SPEC}"
    with pytest.raises(RankError) as error:
        ranks(2).run(train_in_megatron_lm, arguments, "spec", str(tmp_path))
    assert "--pipeline-model-parallel-size (2) must be 1 with --spec" in error.value.reasons[0]


@pytest.mark.parallel
def test_example_script_trains_on_mock_data(ranks, tmp_path):
    steps = 4
    arguments = (
        f"{ARGUMENTS} --mock-data --expert-model-parallel-size 2 --moepp-tau 0.5 "
        f"--train-iters {steps}"
    )
    first, *others = ranks(2).run(run_script, arguments, str(tmp_path))
    assert len(first["lm loss"]) == steps
    assert first["lm loss"][-1] < first["lm loss"][0]
    assert all(value > 0 for value in first["load_balancing_loss"])
    assert others == [first]
