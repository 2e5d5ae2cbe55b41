"""Machine inputs fitted to measured runs, held near the usual ones where the runs do not say.

Errors are differences of logarithms of speed. A step is Gauss-Newton's for their squares plus the
squared distances of the inputs from their start, both in units of what is plausible; large errors
weigh less (Huber), so that one doubtful row does not decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from moepp_megatron.config import ConfigError
from moepp_megatron.config.hardware import Hardware
from moepp_megatron.workbench.planning.machine import Efficiencies, machine_of
from moepp_megatron.workbench.planning.measured.compare import compare
from moepp_megatron.workbench.planning.measured.rows import Run

# What may be fitted, and by how much (of the logarithm) it plausibly differs from the usual.
_INPUTS: Mapping[str, float] = {
    "bf16_matmul": 0.15,
    "fp8_matmul": 0.15,
    "fp8_blockwise_matmul": 0.15,
    "mxfp8_matmul": 0.15,
    "attention_scale": 0.2,
    "memory": 0.2,
    "launch_s": 0.7,
    "metadata_s": 0.7,
    "plain_overlap": 0.3,
    "nvlink": 0.3,
    "network": 0.3,
}
# Error of the model that no input takes away, and the error from which a row weighs less.
_ROW_ERROR, _LARGE_ERROR = 0.05, 0.15
_STEPS, _PROBE = 4, 0.02
# An input that changes no row by more than this (of a 2% change) is not changed.
_LEAST_EFFECT = 1e-4
# Shares of a rated number.
_SHARES = frozenset(_INPUTS) - {"launch_s", "metadata_s", "attention_scale"}

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """Fitted inputs."""

    hardware: Hardware  # the GPU with the fitted inputs in `reached`
    changed: Mapping[str, tuple[float, float]]  # input -> value before and after
    before: tuple[float, ...]  # error of each row before
    after: tuple[float, ...]  # error of each row after
    held_out: tuple[float, ...]  # error of each row by the fit of all others, to first order
    rows: tuple[Run, ...]  # the rows, in the same order

    def yaml(self, source: str) -> str:
        """The hardware file; `source` is the file of rows, for its comment."""
        content: dict[str, Any] = self.hardware.model_dump(mode="json", exclude_unset=True)
        header = f"# Inputs under reached: fitted to {len(self.rows)} runs of {source}.\n"
        return header + yaml.safe_dump(content, sort_keys=False)


def fit(runs: Sequence[Run]) -> Fit:
    """Fit the inputs of one kind of GPU to the measured rows in scope.

    Raises:
        ConfigError: If there are fewer than three such rows, or rows of several kinds of GPU.
    """
    rows = tuple(run for run in runs if run.row.scope == "in" and run.tokens_per_s_per_gpu)
    if len(rows) < 3:
        raise ConfigError(
            f"--fit needs at least 3 measured rows of scope in, and there are {len(rows)}; "
            "measure more layouts"
        )
    hardware = rows[0].hardware
    if any(run.hardware != hardware for run in rows):
        kinds = ", ".join(sorted({run.hardware.name for run in rows}))
        raise ConfigError(
            f"--fit needs rows of one kind of GPU, not of {kinds}; give a file for each"
        )
    start = Efficiencies.of(hardware.reached, hardware.name)
    names = list(_INPUTS)
    origin = np.array([getattr(start, name) for name in names])
    spread = np.array(list(_INPUTS.values()))
    shift = np.zeros(len(names))

    def errors(at: Values) -> Values:
        machine = machine_of(hardware, _moved(start, names, origin, at))
        relative = [compare(run, machine).error for run in rows]
        return np.log1p(np.array(relative, dtype=float))

    before = now = errors(shift)
    for _ in range(_STEPS):
        slopes = _slopes(errors, shift, now)
        useful = np.abs(slopes).max(axis=0) * _PROBE > _LEAST_EFFECT
        system = _Ridge(slopes[:, useful], now, shift[useful], spread[useful])
        shift[useful] = system.solve()
        shift = _bounded(names, origin, shift)
        now = errors(shift)
    last = _Ridge(_slopes(errors, shift, now)[:, useful], now, shift[useful], spread[useful])
    fitted = _moved(start, names, origin, shift)
    used = [name for name, is_useful in zip(names, useful, strict=True) if is_useful]
    changed = {name: (getattr(start, name), getattr(fitted, name)) for name in used}
    reached = {name: float(f"{after:.4g}") for name, (_, after) in changed.items()}
    hardware = hardware.model_copy(update={"reached": {**hardware.reached, **reached}})
    early, late, without = (tuple(np.expm1(logs)) for logs in (before, now, last.left_out()))
    return Fit(hardware, changed, early, late, without, rows)


def _moved(
    start: Efficiencies, names: Sequence[str], origin: Values, shift: Values
) -> Efficiencies:
    values: dict[str, Any] = dict(zip(names, map(float, origin * np.exp(shift)), strict=True))
    return replace(start, **values)


def _bounded(names: Sequence[str], origin: Values, shift: Values) -> Values:
    """Shares of rated numbers stay below 1."""
    is_share = np.array([name in _SHARES for name in names])
    most = np.where(is_share, np.log(0.98 / np.minimum(origin, 0.98)), np.inf)
    return np.minimum(shift, most)


def _slopes(errors: Any, shift: Values, now: Values) -> Values:
    """Change of each row's error with the logarithm of each input [rows, inputs]."""
    # Downwards: a share near 1 stays below it.
    probes = shift - _PROBE * np.eye(len(shift))
    return np.stack([(now - errors(probe)) / _PROBE for probe in probes], axis=1)


class _Ridge:
    """One linear step: errors `now + slopes (new - shift)`, inputs near 0."""

    def __init__(self, slopes: Values, now: Values, shift: Values, spread: Values) -> None:
        self._slopes, self._spread = slopes, spread
        # Errors as they would be with the inputs where they started.
        self._rest = now - slopes @ shift
        self._weights = np.minimum(1.0, _LARGE_ERROR / np.maximum(np.abs(now), 1e-9))

    def solve(self, without: int | None = None) -> Values:
        """Distances of the inputs from their start."""
        weights = self._weights / _ROW_ERROR**2
        if without is not None:
            weights[without] = 0.0
        normal = (self._slopes.T * weights) @ self._slopes + np.diag(1.0 / self._spread**2)
        return np.asarray(np.linalg.solve(normal, -(self._slopes.T * weights) @ self._rest))

    def left_out(self) -> Values:
        """Error of each row with the inputs that all others give."""
        rows = enumerate(zip(self._rest, self._slopes, strict=True))
        return np.array([rest + slopes @ self.solve(without=row) for row, (rest, slopes) in rows])
