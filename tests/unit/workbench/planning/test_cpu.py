"""A machine without cards: its rates, what it changes in the model, and how rates are found."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.calibration import (
    Observation,
    fit,
    layout_observation,
    optimizer_observation,
    product_observation,
)
from moepp_megatron.config import Config, ConfigError, Layout, load_config
from moepp_megatron.workbench.planning.cpu_rates import CpuRates, parse_rates
from moepp_megatron.workbench.planning.data_parallel import step_end
from moepp_megatron.workbench.planning.grid import Grid
from moepp_megatron.workbench.planning.imbalance import FORCED_BALANCE
from moepp_megatron.workbench.planning.machine import cpu_machine
from moepp_megatron.workbench.planning.memory import rank_memory
from moepp_megatron.workbench.planning.parameters import RankParameters
from moepp_megatron.workbench.planning.rates import Product, product_seconds
from moepp_megatron.workbench.planning.step import step_time
from moepp_megatron.workbench.planning.workload import Workload

QUICKSTART = Path(__file__).parents[4] / "configs" / "quickstart.yaml"
RATES = CpuRates(
    flop_s=1.5e-11,
    thin_s=1e-9,
    moved_s=2e-10,
    crowd_s=4e-11,
    kernel_s=8e-6,
    send_s=6e-10,
    start_s=1e-4,
    state_s=3e-10,
)
EP1 = "parallel.expert_model_parallel_size=1"
TP2 = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
PP2 = "parallel.pipeline_model_parallel_size=2"
CP2 = "parallel.context_parallel_size=2"
FITTED = (
    (1, (EP1,)),
    (1, (EP1, "training.micro_batch_size=1")),
    (2, ()),
    (2, (EP1,)),
    (2, (EP1, *TP2)),
    (2, (EP1, PP2)),
    (2, (EP1, CP2)),
    (2, ("training.micro_batch_size=1",)),
    (2, ("moe.tau=0.1",)),
)
HELD_OUT = (
    (1, (EP1, "moe.tau=0.1")),
    (2, ("training.micro_batch_size=2",)),
    (2, ("moe.dispatcher=allgather",)),
    (2, (*TP2,)),
    (2, (EP1, PP2, "training.micro_batch_size=2")),
    (2, ("training.recompute_granularity=selective", "training.recompute_modules=[moe]")),
)


def configured(*settings: str) -> Config:
    return load_config(QUICKSTART, ["run.dir=unused", *settings])


def observed(ranks: int, settings: tuple[str, ...]) -> Observation:
    """A layout that takes what the model says under `RATES`."""
    config = configured(*settings)
    one = layout_observation(config, Layout.from_config(config, ranks), 2, seconds=1.0)
    return replace(one, seconds=one.predict(RATES))


def test_fit_finds_the_rates_behind_the_times() -> None:
    parts = [product_observation((1024, n, 192), 2, 1.0) for n in (32, 128, 1024)]
    parts += [optimizer_observation(2**20, 1.0)]
    parts = [replace(one, seconds=one.predict(RATES)) for one in parts]
    rates = fit([observed(*one) for one in FITTED], parts)
    for one in HELD_OUT:
        held = observed(*one)
        assert held.predict(rates) == pytest.approx(held.seconds, rel=0.02)
    assert rates.flop_s == pytest.approx(RATES.flop_s, rel=0.1)


def test_no_rate_falls_below_zero() -> None:
    # Faster with another rank on the machine: no rate of 0 or more says that.
    alone, both = observed(1, (EP1,)), observed(2, (EP1,))
    rates = fit([alone, replace(both, seconds=both.seconds / 3)], [])
    assert min(asdict(rates).values()) >= 0.0
    with pytest.raises(ValueError, match="at least one layout"):
        fit([], [])


def test_ranks_beyond_the_cores_take_turns() -> None:
    assert RATES.among(1, 2).moved_s == RATES.moved_s
    assert RATES.among(2, 2).moved_s == pytest.approx(RATES.moved_s + RATES.crowd_s)
    crowded = RATES.among(4, 2)
    assert crowded.flop_s == 2 * RATES.flop_s
    assert crowded.send_s == RATES.send_s


def test_a_core_has_no_waves_and_hides_nothing() -> None:
    machine = cpu_machine(RATES, 1, 2)
    one, more = Product(129, 512, 256, number="fp32"), Product(128, 512, 256, number="fp32")
    ratio = product_seconds(one, machine) / product_seconds(more, machine)
    assert ratio == pytest.approx(129 / 128, rel=0.02)
    assert product_seconds(Product(0, 512, 256, number="fp32"), machine) == 0.0
    config = configured(EP1)
    load, grid = Workload.from_config(config, "local"), Grid(2, grad_overlap=True)
    end = step_end(load, grid, cpu_machine(RATES, 2, 2), RankParameters(10**6, 10**6))
    assert end.exposed(grid, 1e9, 1e9) == end.reduce + end.gather > 0


def test_time_of_a_step_grows_with_every_rate() -> None:
    config = configured(PP2, "training.micro_batch_size=2", EP1)
    load = Workload.from_config(config, "local")
    grid = Grid.from_layout(config, Layout.from_config(config, 2))

    def seconds(rates: CpuRates) -> float:
        return step_time(load, grid, cpu_machine(rates, 2, 2), FORCED_BALANCE).total

    for name, value in asdict(RATES).items():
        assert seconds(replace(RATES, **{name: 2 * value})) > seconds(RATES), name


def test_local_modules_keep_scores_and_less_of_the_experts() -> None:
    config = configured(EP1)
    layout = Layout.from_config(config, 1)
    fused, own = (rank_memory(config, layout, 0, kind) for kind in ("fused", "local"))
    assert (own.weights, own.optimizer) == (fused.weights, fused.optimizer)
    # Four layers' probabilities of 4 sequences, 6 heads, 256 x 256 in fp32.
    assert own.activations > fused.activations + 4 * 4 * 6 * 256**2 * 4 / 2
    longer = configured(EP1, "model.seq_length=512", "training.micro_batch_size=2")
    grown = rank_memory(longer, Layout.from_config(longer, 1), 0, "local")
    # As many tokens, twice the scores.
    assert grown.activations - own.activations == pytest.approx(4 * 4 * 6 * 256**2 * 4, rel=0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "must give flop_s"),
        ({"flop_s": 1}, "must give flop_s, thin_s"),
        ({**asdict(RATES), "kernel_s": -1}, r"kernel_s \(-1\) must be a number of 0 or more"),
        ({**asdict(RATES), "kernel_s": "x"}, r"kernel_s \(x\) must be a number of 0 or more"),
    ],
)
def test_bad_rates_are_refused(values: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_rates(values, "rates.json")


def test_rates_survive_a_file() -> None:
    assert parse_rates(asdict(RATES), "rates.json") == RATES
