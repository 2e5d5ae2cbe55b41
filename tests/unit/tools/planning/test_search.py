"""The search against the configuration's own rules, and the plan that comes of it."""

import itertools
import re
from dataclasses import replace

import pytest

from moepp_megatron.config import ConfigError, Layout, load_config, parse_config
from moepp_megatron.config.hardware import load_hardware
from moepp_megatron.tools.planning.grid import FULL, Grid
from moepp_megatron.tools.planning.machine import Machine
from moepp_megatron.tools.planning.memory import GIB
from moepp_megatron.tools.planning.overlay import config_of
from moepp_megatron.tools.planning.plan import TIE, _complexity, _make_plan
from moepp_megatron.tools.planning.search import Space, _LayoutCosts
from moepp_megatron.tools.planning.workload import Workload
from tests import ROOT
from tests.refusals import config_error

WORLD = 16


def configured(model=None, moe=None, batch=24, **sections):
    return parse_config(
        {
            "run": {"dir": "runs/test"},
            "model": {
                "num_layers": 6,
                "hidden_size": 96,
                "ffn_hidden_size": 384,
                "num_attention_heads": 12,
                "num_query_groups": 6,
                "seq_length": 16384,
                "vocab_size": 1024,
                **(model or {}),
            },
            "moe": {"num_ffn_experts": 12, **(moe or {})},
            "precision": {"dtype": "bf16"},
            "optimizer": {"lr": 1e-3},
            "training": {"train_iters": 10, "global_batch_size": batch, "micro_batch_size": 1},
            **sections,
        }
    )


def is_legal(config, grid):
    try:
        config_of(config, grid)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize(
    "config",
    [
        configured(),
        configured(
            moe={"dispatcher": "flex", "layer_freq": 2, "shared_expert_ffn_hidden_size": 40},
            parallel={"expert_model_parallel_size": 2},
        ),
        configured(model={"vocab_size": 1026, "num_query_groups": None}, batch=32),
        configured(model={"num_query_groups": 2}, moe={"constants_shared": True}),
        configured(moe={"static_rows": 1.5}),
    ],
    ids=["plain", "flex-dense-shared", "odd-vocabulary", "one V, shared key heads", "static rows"],
)
def test_space_holds_what_the_rules_accept(config):
    found = set(Space.of(config, WORLD, per_node=8).grids())
    assert found
    tried = itertools.product(
        (1, 2, 3, 4), (1, 2), (1, 2, 3, 4), (1, 2, 3), (1, 3, 4), (1, 2), (1, 2)
    )
    for tp, cp, pp, vpp, ep, etp, micro_batch in tried:
        # What the search leaves out knowingly, and what is no layout at all.
        if WORLD % (tp * cp * pp) or etp not in (1, tp) or (pp == 1 and vpp > 1):
            continue
        if pp * vpp > 6 or (vpp > 1 and 6 % (pp * vpp) and 8 % (pp * vpp)):
            continue
        shared = WORLD // (tp * pp) > 1
        grid = Grid(WORLD, tp, cp, pp, vpp, ep, etp, micro_batch, (), False, True, shared, shared)
        assert (grid in found) == is_legal(config, grid), grid


@pytest.mark.parametrize("world", [12, 64])
def test_every_layout_found_is_legal(world):
    config = configured(batch=192)
    grids = list(Space.of(config, world, per_node=8).grids())
    assert len(set(grids)) == len(grids) > 0
    # All is too many to check one by one; every 40th meets every degree and choice.
    for grid in grids[:: max(len(grids) // 60, 1)]:
        layout = Layout.from_config(config_of(config, grid), world)
        own = (grid.dp, grid.edp, grid.micro_batches(192), grid.vpp)
        assert own == (layout.dp, layout.edp, layout.num_microbatches, layout.vpp)


def test_overlapped_exchange_only_where_the_rules_allow_it():
    config = configured()
    grids = [grid for grid in Space.of(config, WORLD, 8).grids() if grid.expert_overlap]
    assert grids
    assert all(grid.ep > 1 and grid.recompute not in (FULL, ("moe",)) for grid in grids)
    assert all(is_legal(config, grid) for grid in grids[::25])
    in_fp32 = configured(precision={"dtype": "fp32"})
    one_v = configured(moe={"constants_shared": True})
    static = configured(moe={"static_rows": 1.5})
    for other in (in_fp32, one_v, static):
        assert not any(grid.expert_overlap for grid in Space.of(other, WORLD, 8).grids())
        assert not any(is_legal(other, grid) for grid in grids[::25])
    # Without constant experts there is nothing to share.
    none = configured(moe={"constants_shared": True, "num_constant_experts": 0})
    assert any(grid.expert_overlap for grid in Space.of(none, WORLD, 8).grids())


def test_a_configuration_becomes_its_grid_again():
    config = configured()
    grids = list(Space.of(config, WORLD, 8).grids())
    for grid in grids[::200]:
        changed = config_of(config, grid)
        found = Grid.from_config(changed, Layout.from_config(changed, WORLD).world_size)
        assert found == replace(grid, states=())


def test_the_plan_is_the_best_of_all_layouts(h100):
    config = configured(batch=96)
    plan = _make_plan(config, WORLD, h100, taus=(0.25,), top=3)
    space = Space.of(config, WORLD, 8)
    costs = space.costs(h100)
    fitting = {
        grid: costs.seconds(grid)
        for grid in space.grids()
        if not grid.states and costs.memory(grid) <= h100.usable_bytes
    }
    fastest = min(fitting.values())
    assert plan.best is not None
    assert plan.fastest.step.total == pytest.approx(fastest)
    # The plan is a tie with it, and none of the ties is simpler.
    assert plan.best.step.total <= fastest * (1 + TIE)
    ties = [grid for grid, total in fitting.items() if total <= fastest * (1 + TIE)]
    least = min(_complexity(costs.named(grid), config) for grid in ties)
    assert _complexity(plan.best.grid, config) == least
    times = [planned.step.total for planned in plan.layouts[1:]]
    assert times == sorted(times)
    assert [(baseline.kind, baseline.tau) for baseline in plan.baselines] == [
        ("vanilla", None),
        ("moepp", 0.25),
    ]
    assert plan.baselines[0].ffn_share == 1
    assert plan.search.legal == len(list(space.grids()))
    assert plan.search.too_large <= plan.search.legal - len(fitting)
    hours = plan.best.run_seconds(1e9) / 3600
    assert hours * 3600 * plan.best.tokens_per_s_per_gpu * WORLD == pytest.approx(1e9)


def test_a_budget_is_planned_beside_taus_and_vanilla(h100):
    config = configured(moe={"budget": {"target_ffn_per_token": 1.2}}, batch=96)
    plan = _make_plan(config, WORLD, h100, taus=(0.25,), top=1)
    assert plan.best.ffn_share == pytest.approx(0.6)
    assert [baseline.kind for baseline in plan.baselines] == ["vanilla", "moepp"]


def test_a_model_that_does_not_fit_names_what_comes_closest(h100):
    # Too little for any layout, with a margin or without.
    tiny = replace(h100, memory_bytes=1e9)
    plan = _make_plan(configured(), 1, tiny)
    assert plan.best is None
    assert plan.search.too_large == plan.search.legal
    assert plan.layouts
    assert not any(planned.fits for planned in plan.layouts)


def test_states_are_kept_in_bf16_only_for_room(h100):
    config, states = configured(batch=8), ("moments", "gradients")
    space = Space.of(config, 4, 8)
    costs = space.costs(h100)
    assert set(space.states) == {(), ("moments",), states}
    least = {
        kept: min(costs.memory(grid) for grid in space.grids() if grid.states == kept)
        for kept in space.states
    }
    assert sorted(least.values(), reverse=True) == list(least.values())
    # Room for both in bf16, and not for fp32: with the margin that stays free.
    margin = h100.memory_bytes / h100.usable_bytes
    small = replace(h100, memory_bytes=1.0001 * margin * least[states])
    best = _make_plan(config, 4, small).best
    assert best is not None
    assert best.grid.states == states
    changed = config_of(config, best.grid)
    assert changed.optimizer.bf16_moments == ("exp_avg_dtype", "exp_avg_sq_dtype")
    assert not changed.precision.grad_reduce_in_fp32
    assert best.step.total == pytest.approx(costs.seconds(best.grid))
    # They are no states of optimizers whose rules refuse them.
    for other in ({"optimizer": {"lr": 1e-3, "adam_beta2": 0.999}}, {"precision": {}}):
        assert set(Space.of(configured(**other), WORLD, 8).states) == {()}
    # What fits in fp32 is not given up for little.
    assert _make_plan(config, 4, h100).best.grid.states == ()


def test_what_cannot_be_planned_is_refused(h100):
    with config_error(r"--gpus \(7\) must allow a legal layout"):
        _make_plan(configured(), 7, h100)
    ampere = Machine.of(load_hardware("a100_sxm"))
    fp8 = configured(precision={"dtype": "bf16", "fp8": "hybrid"})
    with config_error(r"precision.fp8 \(hybrid\) must be a format of a100"):
        _make_plan(fp8, 8, ampere)
    with config_error(r"hardware \(cpu\) must give memory_gb"):
        Machine.of(load_hardware("cpu"))


def test_the_fastest_dispatcher_is_taken_where_tokens_travel(h100):
    config = configured(
        moe={"dispatcher": "flex"}, parallel={"expert_model_parallel_size": 2}, batch=96
    )
    space = Space.of(config, WORLD, 8)
    assert space.dispatchers == ("flex", "alltoall", "alltoall_dedup")
    free = space.costs(h100)
    each = {
        name: replace(space, load=space.load.with_dispatcher(name), dispatchers=()).costs(h100)
        for name in space.dispatchers
    }
    seen = set()
    for grid in list(space.grids())[::211]:
        chosen = free.named(grid).dispatcher
        assert chosen is not None
        seen.add(chosen)
        allowed = {"alltoall", "flex", "alltoall_dedup"}
        if grid.expert_overlap:
            allowed -= {"alltoall_dedup"}
        if grid.ep * grid.etp == 1:
            allowed -= {"flex"}
        if grid.ep in (1, 12):
            allowed -= {"alltoall_dedup"}
        assert chosen in allowed
        totals = {name: each[name].seconds(grid) for name in allowed}
        assert free.seconds(grid) == pytest.approx(totals[chosen])
        assert totals[chosen] == pytest.approx(min(totals.values()), rel=1e-6)
        assert free.memory(grid) == pytest.approx(each[chosen].memory(grid))
        assert config_of(config, free.named(grid)).moe.dispatcher == chosen
    assert len(seen) > 1


def test_latent_attention_may_repeat_its_expansions():
    latent = {"kv_lora_rank": 32, "qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 16}
    shape = {"latent_attention": latent, "num_query_groups": None}
    config = configured(model=shape, moe={"layer_freq": 2})
    found = {grid.recompute for grid in Space.of(config, WORLD, 8).grids()}
    assert found >= {("mla_up_proj",), ("mla_up_proj", "mlp"), ("core_attn",)}
    plain = {grid.recompute for grid in Space.of(configured(), WORLD, 8).grids()}
    assert not any("mla_up_proj" in recompute for recompute in plain)


def test_a_margin_of_memory_stays_free(h100):
    config = configured(model={"num_layers": 2})
    costs = _LayoutCosts(Workload.from_config(config), h100)
    grid = Grid(WORLD, tp=2, ep=2)
    held = costs.memory(grid)
    full = replace(h100, memory_bytes=held * 1.005)
    assert full.usable_bytes < held < full.memory_bytes
    plan = _make_plan(config, WORLD, full, top=3)
    assert plan.best is not None
    assert all(one.memory_gib * 2**30 <= full.usable_bytes for one in plan.layouts if one.fits)


PLANNED = sorted((ROOT / "configs/h100").glob("*.yaml"))


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_a_planned_configuration_says_what_it_costs_today(h100, path):
    header, config = path.read_text().partition("\n")[0], load_config(path)
    world = int(re.search(r"for (\d+)", header)[1])
    costs, grid = _LayoutCosts(Workload.from_config(config), h100), Grid.from_config(config, world)
    said = f"{costs.seconds(grid):.3f} s per step, {costs.memory(grid) / GIB:.1f} GiB per GPU"
    assert said in header
