"""Adam's moments in bf16: what a step, a checkpoint and the planner make of them."""

import pytest
import torch
from transformer_engine.pytorch.optimizers import FusedAdam

from moepp_megatron.config import Layout
from moepp_megatron.tools.planning.memory import rank_memory
from moepp_megatron.training.checkpoint.optimizer import (
    _join_halves,
    _split_halves,
    complete_state,
    copy_into_shard,
    parameter_shards,
)
from moepp_megatron.training.checkpoint.state import model_state
from moepp_megatron.training.setup import build_training_model
from tests.parallel.test_matrix import check_bf16
from tests.parallel.training_runs import EP2, PP2, TP2, assemble, difference, settings
from tests.te_stand_in.models import config_of
from tests.te_stand_in.rank_runs import train_in_nodes
from tests.te_stand_in.test_checkpoint import BF16_MOMENTS, REMAINDERS, save_and_load, step

NAMES = {"param", "exp_avg", "exp_avg_sq"}


def trained(steps, **sections):
    model = build_training_model(config_of(None, **sections))
    for _ in range(steps):
        step(model)
    return model


def states(model):
    """Return the optimizer's state of each parameter."""
    names = {parameter: name for name, parameter in model.models[0].named_parameters()}
    sharded, found = model_state(model.models), {}
    for part in model.optimizer.chained_optimizers:
        complete_state(part)
        for shard in parameter_shards(part, sharded):
            found[names[shard.parameter]] = shard.tensors
    assert found.keys() == set(names.values())
    return found


def assert_equal(found, states):
    for name, expected in states.items():
        for key, value in expected.items():
            assert torch.equal(found[name][key], value), (name, key)


def test_the_stand_in_is_adamw():
    weights = [torch.nn.Parameter(torch.randn(5, 3, generator=torch.manual_seed(1)))]
    weights.append(torch.nn.Parameter(weights[0].detach().clone()))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = FusedAdam(weights[:1], **settings), torch.optim.AdamW(weights[1:], **settings)
    for seed in range(4):
        for weight in weights:
            weight.grad = torch.randn(5, 3, generator=torch.manual_seed(seed))
        ours.step()
        theirs.step()
    # fp32, and the same operations in another order.
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-7)


def test_a_step_moves_weights_by_moments_before_they_are_rounded():
    """After only the first step both runs have seen the same moments: all of it is equal."""
    plain, bf16 = states(trained(1)), states(trained(1, optimizer=BF16_MOMENTS))
    for name, expected in plain.items():
        assert expected.keys() == bf16[name].keys() == NAMES
        assert torch.equal(bf16[name]["param"], expected["param"]), name
        assert expected["exp_avg"].abs().max() > 0, name
        for moment in ("exp_avg", "exp_avg_sq"):
            assert expected[moment].dtype is torch.float32
            assert bf16[name][moment].dtype is torch.bfloat16
            assert torch.equal(bf16[name][moment], expected[moment].bfloat16()), name


def test_remainders_are_the_fp32_weights():
    """Bit for bit: of every number, and of a run's weights, which it trains as without."""
    bits = torch.randint(-(2**31), 2**31 - 1, (10_000,), generator=torch.manual_seed(1))
    whole = bits.int().view(torch.float32)
    weight, remainder = torch.empty(len(bits)).bfloat16(), torch.empty(len(bits)).short()
    _split_halves(whole, weight, remainder)
    assert torch.equal(_join_halves(weight, remainder).view(torch.int32), bits.int())
    rounded = whole.isfinite() & (bits & 0xFFFF != 0x8000)
    assert torch.equal(weight[rounded], whole.bfloat16()[rounded])
    plain, halves = trained(3), trained(3, optimizer=REMAINDERS)
    kept = halves.optimizer.chained_optimizers[0].optimizer.state.values()
    assert {state["master_param"].dtype for state in kept} == {torch.int16}
    assert_equal(states(halves), states(plain))
    # A weight that the guard puts back reaches both halves.
    name, weight = next(iter(halves.models[0].named_parameters()))
    value = torch.randn(weight.shape, generator=torch.manual_seed(2))
    copy_into_shard(halves.optimizer.chained_optimizers[0], weight, value)
    assert torch.equal(states(halves)[name]["param"], value.flatten())
    config = config_of(None, optimizer=REMAINDERS)
    said = rank_memory(config, Layout.from_config(config, 1), 0)
    assert said.optimizer == 10 * (said.dense + said.experts)


def test_the_planner_counts_what_is_kept():
    for optimizer in ({}, BF16_MOMENTS, {"exp_avg_sq_dtype": "bf16"}):
        config = config_of(None, optimizer=optimizer)
        kept = [
            value
            for of in states(trained(1, optimizer=optimizer)).values()
            for value in of.values()
        ]
        said = rank_memory(config, Layout.from_config(config, 1), 0)
        assert sum(value.numel() * value.element_size() for value in kept) == said.optimizer
        assert said.optimizer == (12 - 2 * len(optimizer)) * (said.dense + said.experts)


def test_a_checkpoint_before_the_first_step_holds_the_weights(tmp_path):
    first = trained(0, optimizer=BF16_MOMENTS)
    second = trained(1, optimizer=BF16_MOMENTS, training={"seed": 5})
    save_and_load(tmp_path, first, second)
    for name, state in states(second).items():
        weight = dict(first.models[0].named_parameters())[name]
        assert torch.equal(state["param"], weight.detach().float().flatten()), name
    assert torch.equal(step(second), step(first))


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [({}, BF16_MOMENTS), (BF16_MOMENTS, REMAINDERS), (REMAINDERS, {})],
)
def test_a_run_continues_with_the_other_type(tmp_path, saved, loaded):
    first, second = trained(2, optimizer=saved), trained(0, optimizer=loaded)
    save_and_load(tmp_path, first, second)
    found = states(second)
    for name, expected in states(first).items():
        for key, value in expected.items():
            assert torch.equal(found[name][key], value.to(found[name][key].dtype)), (name, key)
    assert step(second).isfinite()


def run_of(ranks, world_size, **sections):
    results = ranks(world_size).run(train_in_nodes, settings(**sections), 5)
    return assemble([run for run, _ in results])


@pytest.fixture(scope="module")
def alone(ranks):
    """One rank: moments in bf16 and in fp32, and all in fp32."""
    bf16 = {"precision": {"dtype": "bf16"}}
    return {
        "moments": run_of(ranks, 1, **bf16, optimizer=BF16_MOMENTS),
        "bf16": run_of(ranks, 1, **bf16),
        "fp32": run_of(ranks, 1),
    }


@pytest.mark.parametrize("parallel", [{}, EP2, TP2, PP2], ids=["data", "ep", "tp", "pp"])
def test_two_ranks_train_as_one(ranks, alone, parallel):
    # The test can fail: moments in fp32 are another run.
    assert alone["moments"].losses != alone["bf16"].losses
    sections = {"precision": {"dtype": "bf16"}, "optimizer": BF16_MOMENTS, "parallel": parallel}
    found = difference(run_of(ranks, 2, **sections), alone["moments"])
    check_bf16(found, difference(alone["bf16"], alone["fp32"]))
