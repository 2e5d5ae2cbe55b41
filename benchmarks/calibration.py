"""The numbers of a machine without cards from step times that were measured on it.

A step's time is a sum of counts (FLOP, bytes, starts) times the rates of `CpuRates`, so that rates
follow from times by least squares of the relative errors, none of them below 0. The slowest stage
of a pipeline may be another with other rates: the sum is taken anew at each solution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.config import Config, Layout, stage_layers
from moepp_megatron.workbench.planning.cpu_rates import CpuRates
from moepp_megatron.workbench.planning.grid import Grid
from moepp_megatron.workbench.planning.imbalance import FORCED_BALANCE
from moepp_megatron.workbench.planning.machine import cpu_machine
from moepp_megatron.workbench.planning.step import step_time
from moepp_megatron.workbench.planning.workload import Workload

# Where the search starts, and what a number stays near that no measurement says anything of.
_START = CpuRates(
    flop_s=2e-11,
    thin_s=5e-10,
    moved_s=1.5e-10,
    crowd_s=2e-11,
    kernel_s=1e-5,
    send_s=1e-9,
    start_s=2e-4,
    state_s=2e-10,
)
_HELD = 1e-3
_ROUNDS, _SWEEPS = 6, 3000
_STEP = 1e-3


@dataclass(frozen=True)
class Observation:
    """Something that was timed.

    Attributes:
        predict: Its time under given rates, seconds.
        seconds: Its measured time.
    """

    predict: Callable[[CpuRates], float]
    seconds: float


def layout_observation(config: Config, layout: Layout, cores: int, seconds: float) -> Observation:
    """A training step, its routing held at balance."""
    load, grid = Workload.from_config(config, "local"), Grid.from_layout(config, layout)
    stages = stage_layers(config)

    def predict(rates: CpuRates) -> float:
        machine = cpu_machine(rates, grid.world, cores)
        return step_time(load, grid, machine, FORCED_BALANCE, stages).total

    return Observation(predict, seconds)


def product_observation(shape: tuple[float, ...], ranks: int, seconds: float) -> Observation:
    """A product of rows m, columns n, inner dimension k, on ranks with a core each."""
    m, n, k = shape

    def predict(rates: CpuRates) -> float:
        own = rates.among(ranks, ranks)
        return own.product_seconds(m, n, k, 1) + own.kernel_s

    return Observation(predict, seconds)


def optimizer_observation(parameters: int, seconds: float) -> Observation:
    """The update of fp32 parameters by Adam: gradient, moments, weights, as `data_parallel` has."""
    return Observation(lambda rates: rates.state_s * 28 * parameters, seconds)


def fit(steps: Sequence[Observation], parts: Sequence[Observation]) -> CpuRates:
    """Rates under which what was measured comes out best.

    Args:
        steps: Training steps.
        parts: Single operations; all of them together weigh as much as the steps.

    Raises:
        ValueError: No steps.
    """
    if not steps:
        raise ValueError("steps must hold at least one layout that was measured")
    observations = [*steps, *parts]
    weights = np.ones(len(observations))
    if parts:
        weights[len(steps) :] = np.sqrt(len(steps) / len(parts))
    values = np.array(list(asdict(_START).values()))
    for _ in range(_ROUNDS):
        scaled = _shares(observations, values) * weights[:, None]
        values = values * _not_negative(scaled, weights)
    return _rates(values)


def _rates(values: NDArray[np.float64]) -> CpuRates:
    names = [field.name for field in fields(CpuRates)]
    return CpuRates(**dict(zip(names, values.tolist(), strict=True)))


def _shares(
    observations: Sequence[Observation], values: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[observations, rates] what each rate contributes to a time, over the measured one."""
    found = np.zeros((len(observations), len(values)))
    middle = [one.predict(_rates(values)) for one in observations]
    for column in range(len(values)):
        changed = values.copy()
        changed[column] *= 1 + _STEP
        rates = _rates(changed)
        for row, one in enumerate(observations):
            found[row, column] = (one.predict(rates) - middle[row]) / _STEP / one.seconds
    return found


def _not_negative(matrix: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Factors of 0 or more on the columns, least squares, held near 1 where nothing tells."""
    square = matrix.T @ matrix + _HELD * np.eye(matrix.shape[1])
    right = matrix.T @ wanted + _HELD
    factors = np.ones(matrix.shape[1])
    for _ in range(_SWEEPS):
        for index in range(len(factors)):
            gap = right[index] - square[index] @ factors
            factors[index] = max(factors[index] + gap / square[index, index], 0.0)
    return factors
