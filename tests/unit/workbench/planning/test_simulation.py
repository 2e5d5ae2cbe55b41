"""Played steps beside the plan's formula, and what uneven load, slow nodes and networks do."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from moepp_megatron.config import parse_config
from moepp_megatron.workbench.planning.grid import Grid
from moepp_megatron.workbench.planning.imbalance import FORCED_BALANCE, AssumedRouting, rank_load
from moepp_megatron.workbench.planning.layer_time import EXCHANGE, layer_key
from moepp_megatron.workbench.planning.links import Placement
from moepp_megatron.workbench.planning.machine import Machine
from moepp_megatron.workbench.planning.pipeline import (
    bubble_seconds,
    even_stages,
    late_messages,
    split_passes,
)
from moepp_megatron.workbench.planning.simulation.contention import Fabric
from moepp_megatron.workbench.planning.simulation.events import Durations, Message, play
from moepp_megatron.workbench.planning.simulation.faults import Faults, slow_factors
from moepp_megatron.workbench.planning.simulation.load import EVEN, LoadSource, fullest_ranks
from moepp_megatron.workbench.planning.simulation.schedule import rank_order, step_graph
from moepp_megatron.workbench.planning.simulation.step import Conditions, simulate
from moepp_megatron.workbench.planning.step import BUBBLE, DATA, OPTIMIZER, stage_passes, step_time
from moepp_megatron.workbench.planning.workload import Workload

QUIET = Conditions(EVEN)
NO_MESSAGE = Message(0.0, 0.0)


def workload(batch: int = 512, layers: int = 16, vocab: int = 65536, topk: int = 2) -> Workload:
    return Workload.from_config(
        parse_config(
            {
                "run": {"dir": "runs/test"},
                "model": {
                    "num_layers": layers,
                    "hidden_size": 2048,
                    "ffn_hidden_size": 5632,
                    "num_attention_heads": 16,
                    "seq_length": 4096,
                    "vocab_size": vocab,
                },
                "moe": {"num_ffn_experts": 16, "router_topk": topk},
                "precision": {"dtype": "bf16"},
                "optimizer": {"lr": 1e-3},
                "training": {
                    "train_iters": 10,
                    "global_batch_size": batch,
                    "micro_batch_size": 1,
                },
            }
        )
    )


@pytest.mark.parametrize(("pp", "vpp", "count"), [(1, 1, 3), (4, 1, 6), (4, 1, 2), (4, 3, 8)])
@pytest.mark.parametrize("extra", [False, True])
def test_passes_come_in_megatrons_order(pp: int, vpp: int, count: int, extra: bool) -> None:
    from megatron.core.pipeline_parallel.schedules import (
        get_pp_rank_microbatches,
        get_schedule_table,
    )

    table = get_schedule_table(count, vpp, pp)
    for rank in range(pp):
        where = SimpleNamespace(
            pp_group=SimpleNamespace(size=lambda: pp, rank=lambda rank=rank: rank),
            virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        )
        _, _, warm_up, _ = get_pp_rank_microbatches(
            count,
            vpp,
            pp,
            overlap_moe_expert_parallel_comm=extra,
            p2p_communicator=where,
        )
        order = rank_order(pp, vpp, rank, count, extra)
        ahead = [(one.micro_batch, one.chunk) for one in order if not one.is_backward]
        back = [(one.micro_batch, one.chunk) for one in order if one.is_backward]
        assert ahead == table
        # Backward, the chunks come the other way round.
        assert back == [(micro_batch, vpp - 1 - chunk) for micro_batch, chunk in table]
        first_back = next(number for number, one in enumerate(order) if one.is_backward)
        if extra and pp == 1:
            # `combined_1f1b_schedule_for_no_pipelining`: one forward pass, then pairs.
            warm_up = 1
        assert first_back == min(warm_up + 1, len(table))
        steady = order[warm_up : len(order) - warm_up]
        assert [one.is_backward for one in steady] == [False, True] * (len(steady) // 2)


def played(
    pp: int, vpp: int, *passes: np.ndarray, message: Message = NO_MESSAGE, count: int = 8
) -> float:
    """End of the last pass.

    Args:
        pp: Pipeline ranks.
        vpp: Model chunks of each.
        passes: Forward and backward alone, and beside each other in the combined schedule
            [stages], the same for all micro-batches.
        message: Between stages.
        count: Micro-batches.
    """
    graph = step_graph(pp, vpp, count, len(passes) > 2)
    shape = (pp * vpp, count, 1, 1)
    durations = [np.broadcast_to(one[:, None, None, None], shape).copy() for one in passes]
    return float(play(graph, Durations(*durations), message, np.zeros(pp)).finish.max())


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 3)])
def test_equal_stages_wait_as_the_formula_says(pp: int, vpp: int) -> None:
    even = np.ones(pp * vpp)
    # (m + (p - 1) / v) passes of a rank's v chunks, 1 + 2 seconds each.
    expected = (8 * vpp + pp - 1) * 3.0
    assert played(pp, vpp, even, 2 * even) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("pp", "vpp", "count"), [(1, 1, 1), (1, 1, 8), (2, 2, 2), (2, 2, 8), (4, 3, 4), (4, 3, 16)]
)
def test_combined_passes_take_what_the_formula_says(pp: int, vpp: int, count: int) -> None:
    even = np.ones(pp * vpp)
    # Alone 1 + 2 seconds a chunk; a pair hides more than it loses, but is longer than either.
    taken = played(pp, vpp, even, 2 * even, 0.8 * even, 1.7 * even, count=count)
    alone, together = split_passes(pp, vpp, count, True)
    assert alone + together == count
    passes = 3.0 * alone + 2.5 * together + bubble_seconds((pp - 1) * 3.0, vpp)
    assert taken == pytest.approx(vpp * passes, rel=1e-12)
    # The last rank's passes are those that count.
    last = [node for node in step_graph(pp, vpp, count, True) if node.rank == pp - 1]
    assert sum(len(node.works) == 2 for node in last) == round(together * vpp)


@pytest.mark.parametrize(("pp", "vpp", "count"), [(2, 2, 2), (4, 3, 4), (4, 3, 16)])
def test_nothing_hides_the_messages_of_pairs_and_of_filling(pp: int, vpp: int, count: int) -> None:
    even, late = np.ones(pp * vpp), 0.1
    message = Message(0.0, late)
    for beside in ((), (0.8 * even, 1.7 * even)):
        quiet = played(pp, vpp, even, 2 * even, *beside, count=count)
        taken = played(pp, vpp, even, 2 * even, *beside, message=message, count=count)
        _, together = split_passes(pp, vpp, count, bool(beside))
        expected = late_messages(pp, vpp, together) * late
        assert taken - quiet == pytest.approx(expected, rel=1e-9)


def test_unequal_stages_wait_for_the_slowest() -> None:
    # The path through the slowest stage's m passes, and once through all others.
    ahead, back = np.array([1.0, 1.2, 1.1, 1.7]), np.array([2.0, 2.1, 2.3, 2.9])
    expected = 7 * (1.7 + 2.9) + (ahead + back).sum()
    assert played(4, 1, ahead, back) == pytest.approx(expected, rel=1e-12)


def test_messages_hold_stages_up() -> None:
    even = np.ones(2)
    # The last stage never waits after its first input: 8 x (1 + 2 + 0.1) from 1.1 on.
    blocked = played(2, 1, even, 2 * even, message=Message(0.1, 0.0))
    assert blocked == pytest.approx(1.1 + 8 * 3.1 + 2, rel=1e-12)
    # With one micro-batch in flight beside its own, the last stage waits for every second one's
    # round trip, 0.2 s longer than its passes: before 2, 4 and 6.
    late = played(2, 1, even, 2 * even, message=Message(0.0, 0.1))
    assert late == pytest.approx(1.1 + 8 * 3 + 3 * 0.2 + 0.1 + 2, rel=1e-12)


@pytest.mark.parametrize(
    "grid",
    [
        Grid(8, ep=8, micro_batch=2),
        Grid(64, tp=2, ep=8, expert_overlap=True),
        Grid(64, tp=2, ep=8, micro_batch=1),
        Grid(64, ep=8, etp=2, tp=2, grad_overlap=False, param_overlap=False),
    ],
    ids=["ep", "overlap", "tp", "exposed"],
)
def test_without_a_pipeline_the_plan_is_met_exactly(h100: Machine, grid: Grid) -> None:
    load = workload()
    plan = step_time(load, grid, h100, FORCED_BALANCE)
    step = simulate(load, grid, h100, QUIET, 2, seed=0)
    assert step.totals == pytest.approx([plan.total] * 2, rel=1e-12)
    assert step.data == pytest.approx(plan.seconds[DATA], rel=1e-9)
    assert step.optimizer == pytest.approx(plan.seconds[OPTIMIZER], rel=1e-12)
    assert step.bubble == pytest.approx(0.0, abs=1e-9 * plan.total)


@pytest.mark.parametrize(
    "grid",
    [
        Grid(32, pp=4, ep=4),
        Grid(32, pp=4, vpp=2, ep=4, tp=2),
        Grid(64, pp=2, vpp=4, ep=8, micro_batch=2),
        Grid(64, pp=4, vpp=2, ep=16, micro_batch=8, expert_overlap=True),
        Grid(512, pp=8, vpp=2, ep=16, expert_overlap=True),
    ],
    ids=["1f1b", "interleaved", "many chunks", "overlap, few micro-batches", "overlap"],
)
def test_pipelines_meet_the_plan(h100: Machine, grid: Grid) -> None:
    load = workload()
    plan = step_time(load, grid, h100, FORCED_BALANCE)
    step = simulate(load, grid, h100, QUIET, 1, seed=0)
    assert step.totals[0] == pytest.approx(plan.total, rel=0.01)
    assert step.bubble == pytest.approx(plan.seconds[BUBBLE], abs=0.01 * plan.total)
    assert step.data == pytest.approx(plan.seconds[DATA], abs=0.01 * plan.total)


def test_only_passes_that_run_together_hide_their_exchange(h100: Machine) -> None:
    load, grid = workload(batch=128, topk=6), Grid(64, pp=4, vpp=2, ep=16, expert_overlap=True)
    stages = even_stages(load.layers, grid.pp, grid.vpp)
    # The embedding's share is small and the loss's is not: the last stage is the slowest.
    alone, beside = (
        stage_passes(load, layer_key(one), h100, 1.0, stages)[-1] for one in (grid.apart, grid)
    )
    assert alone.hidden.get(EXCHANGE, 0.0) == 0.0
    plan = step_time(load, grid, h100, FORCED_BALANCE)
    # 8 micro-batches: 5 of a rank's 16 chunks are alone, 11 hide their exchange.
    assert plan.hidden[EXCHANGE] == pytest.approx(11 / 2 * beside.hidden[EXCHANGE])
    exposed = 5 / 2 * alone.seconds[EXCHANGE] + 11 / 2 * beside.seconds[EXCHANGE]
    assert plan.seconds[EXCHANGE] == pytest.approx(exposed)
    # 12 to 6 of a rank's 16 chunks have warmed up before, one more in each.
    graph = step_graph(4, 2, 8, True)
    pairs = [sum(node.rank == rank and len(node.works) == 2 for node in graph) for rank in range(4)]
    assert pairs == [5, 7, 9, 11]
    # All of the first rank's passes are warm-up: none has a partner.
    assert {len(node.works) for node in step_graph(2, 3, 2, True) if node.rank == 0} == {1}


def test_drawn_load_is_that_of_the_plan() -> None:
    rng = np.random.default_rng(1)
    popularity = LoadSource(26.0).popularity(rng, 20, 20, 64)
    selections = 8 * 4096 * 3
    for ranks in (8, 64):
        found = fullest_ranks(rng, popularity, ranks, selections, 16)
        planned = rank_load(AssumedRouting(26.0), 64, ranks, selections)
        # 400 popularities each: three standard errors of the mean.
        error = 3 * found.mean(axis=2).std() * (2 / 400) ** 0.5
        assert found.mean() == pytest.approx(planned.mean, abs=error)


def test_normal_draws_are_as_full_as_multinomial_ones() -> None:
    rng = np.random.default_rng(2)
    share = np.linspace(1.0, 2.0, 8)[None, None] / 12.0
    exact = rng.multinomial(8 * 200, share[0, 0], size=20_000).max(axis=1) * 8 / (8 * 200)
    drawn = fullest_ranks(rng, share, 8, 8 * 200, 20_000)
    assert drawn.mean() == pytest.approx(exact.mean(), rel=2e-3)
    assert np.quantile(drawn, 0.99) == pytest.approx(np.quantile(exact, 0.99), rel=0.01)


def test_recorded_shares_decide_the_load(h100: Machine) -> None:
    # One expert takes half of all selections; the model is deeper than the recorded one.
    shares = np.full((3, 4, 16), 0.5 / 15)
    shares[..., 5] = 0.5
    load, grid = workload(), Grid(16, ep=16)
    step = simulate(load, grid, h100, Conditions(LoadSource(recorded=shares)), 2, seed=0)
    assert step.loads == pytest.approx(np.full(2 * 16, 8.0), rel=0.01)
    even = simulate(load, grid, h100, QUIET, 1, seed=0)
    assert step.totals.min() > even.totals[0]


def test_seeds_decide_everything(h100: Machine) -> None:
    load, grid = workload(), Grid(32, pp=4, ep=4)
    conditions = Conditions(LoadSource(8.0), Fabric(1, 4.0, 8), Faults(slow_nodes=0.3))
    one, again, other = (simulate(load, grid, h100, conditions, 3, seed) for seed in (5, 5, 6))
    assert (one.totals == again.totals).all()
    assert (one.totals != other.totals).all()


def test_slow_nodes_hold_up_their_columns_and_so_all(h100: Machine) -> None:
    ranks = np.arange(64).reshape(4, 2, 8)
    factors = slow_factors(np.random.default_rng(3), Faults(0.4, 1.5), ranks, per_node=4)
    assert set(np.unique(factors)) == {1.0, 1.5}
    load, grid = workload(), Grid(8, ep=8)
    even = simulate(load, grid, h100, QUIET, 1, seed=0)
    all_slow = Conditions(EVEN, None, Faults(slow_nodes=1.0, slow_factor=1.2))
    slow = simulate(load, grid, h100, all_slow, 1, seed=0)
    # Computation takes a fifth longer, exchanges, gradients and optimizer do not.
    assert even.work < slow.work < 1.2 * even.work
    no_exchange = replace(grid, ep=1)
    quiet, held = (simulate(load, no_exchange, h100, one, 1, 0) for one in (QUIET, all_slow))
    assert held.work == pytest.approx(1.2 * quiet.work, rel=1e-9)


def test_what_leaves_a_block_shares_its_uplinks(h100: Machine) -> None:
    rng = np.random.default_rng(4)
    inside, beyond = Placement(64, 8), Placement(512, 8)
    thin = Fabric(leaf_nodes=32, oversubscription=4.0)
    assert thin.is_idle(inside)
    assert not thin.is_idle(beyond)
    assert Fabric().is_idle(beyond)
    # 32 of 63 other nodes are beyond the block, whose 32 ports share 8 uplinks.
    assert thin.slowness(rng, beyond, 0.5, (10,)) == pytest.approx(np.full(10, 32 / 63 * 4))
    hashed = Fabric(leaf_nodes=32, hashed_flows=8).slowness(rng, beyond, 0.5, (2000,))
    more = Fabric(leaf_nodes=32, hashed_flows=256).slowness(rng, beyond, 0.5, (2000,))
    # Balls in bins: the fullest uplink stands out less the more flows there are.
    assert hashed.mean() > more.mean() >= 1.0
    load, grid = workload(), Grid(16, ep=16)
    even = simulate(load, grid, h100, QUIET, 1, seed=0)
    shared = Conditions(EVEN, Fabric(leaf_nodes=1, oversubscription=3.0))
    slow = simulate(load, grid, h100, shared, 1, seed=0)
    third = replace(h100, network=h100.network / 3)
    assert slow.work > even.work
    # Every message between the two nodes takes three times as long.
    expected = simulate(load, grid, third, QUIET, 1, seed=0)
    assert slow.work == pytest.approx(expected.work, rel=1e-6)


def test_sixteen_thousand_ranks_are_played(h100: Machine) -> None:
    load = workload(batch=8192, layers=32)
    grid = Grid(16384, tp=2, pp=8, vpp=2, ep=16)
    step = simulate(load, grid, h100, Conditions(LoadSource(26.0), Fabric(), Faults()), 1, seed=0)
    assert step.columns * step.ranks_per_column * grid.pp == 16384
    assert step.passes == step.columns * 8 * 2 * 2 * grid.micro_batches(8192)
    assert step.totals[0] > simulate(load, grid, h100, QUIET, 1, seed=0).totals[0]
