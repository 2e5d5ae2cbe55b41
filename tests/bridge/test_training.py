"""Models that Megatron-Bridge builds and wraps train to the result of our trainer."""

import pytest

from moepp_megatron.interop.to_hf import mcore_to_hf
from tests.bridge.bridge_runs import pretrain_in_bridge, run_config, train_in_bridge
from tests.interop.checkpoints import load_tensors
from tests.interop.test_export import save_and_compute
from tests.parallel.megatron_lm_runs import SETTINGS
from tests.parallel.ranks import RankError
from tests.parallel.training_runs import EP2, PP2, TP2, assemble, compare

# fp32; the same bound as in the layout matrix and in Megatron-LM's loop.
RELATIVE = 1e-5
STEPS = 5
NO_RESIDUAL = SETTINGS | {"moe": SETTINGS["moe"] | {"gating_residual": False}}


@pytest.mark.parallel
@pytest.mark.parametrize(
    ("raw", "layout", "way"),
    [
        pytest.param(SETTINGS, EP2, "provider", id="ep 2"),
        pytest.param(SETTINGS, TP2, "provider", id="tp 2"),
        pytest.param(SETTINGS, PP2, "provider", id="pp 2"),
        pytest.param(NO_RESIDUAL, PP2, "spec", id="plain GPTModel, pp 2"),
    ],
)
def test_equals_our_trainer(ranks, alone, raw, layout, way):
    results = ranks(2).run(train_in_bridge, raw | {"parallel": layout}, STEPS, way)
    compare(assemble(results), alone(raw, steps=STEPS), RELATIVE)


@pytest.mark.parallel
@pytest.mark.parametrize("layout", [EP2, PP2], ids=["ep 2", "pp 2"])
def test_bridges_own_loop_equals_our_trainer_and_continues_from_its_checkpoint(
    ranks, alone, tmp_path, layout
):
    ranks(1).run(save_and_compute, SETTINGS, tmp_path / "run")
    source, raw = tmp_path / "hf", SETTINGS | {"parallel": layout}
    mcore_to_hf(tmp_path / "run", source)
    saved, whole, rest = (tmp_path / name for name in ("saved", "whole", "rest"))
    results = ranks(2).run(pretrain_in_bridge, raw, 4, saved, source, whole)
    first = assemble(results)
    compare(first, alone(SETTINGS, steps=4), RELATIVE)
    assert sorted(path.name for path in saved.glob("iter_*")) == ["iter_0000002", "iter_0000004"]
    results = ranks(2).run(pretrain_in_bridge, raw, 4, saved, source, rest, begin_at=2)
    again = assemble(results)
    assert (again.losses, again.grad_norms) == (first.losses[2:], first.grad_norms[2:])
    one, other, untrained = map(load_tensors, (whole, rest, source))
    assert one.keys() == other.keys() == untrained.keys()
    assert [name for name in one if not one[name].equal(other[name])] == []
    assert not one["lm_head.weight"].equal(untrained["lm_head.weight"])


@pytest.mark.parallel
def test_a_plain_model_refuses_a_gating_residual_across_stages(ranks):
    with pytest.raises(RankError) as error:
        ranks(2).run(train_in_bridge, SETTINGS | {"parallel": PP2}, 1, "spec")
    message = r"pipeline_model_parallel_size (2) must be 1 for a GPTModelProvider"
    assert message in error.value.reasons[0]


@pytest.mark.parallel
def test_a_checkpoint_names_the_layers_width_and_settings(ranks):
    expected = {
        # 12 fp32 logits.
        "exchanged": 32 + 12,
        "hidden_size": 32,
        "is the same layer": True,
        # What NeMo-RL sets by default.
        "balance_coeff": 0.0,
    }
    assert ranks(2).run(run_config, SETTINGS | {"parallel": PP2}) == [expected] * 2
