"""Rates of one rank of a machine without GPUs: eight measured numbers.

A product on a core has no waves over multiprocessors: its time is proportional to its FLOP, with
more time per FLOP if its smallest dimension is short, because loaded data is then reused less.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from moepp_megatron.config.errors import ConfigError


@dataclass(frozen=True)
class CpuRates:
    """Seconds of one rank that has a core of its own.

    Attributes:
        flop_s: A floating-point operation of a large product.
        thin_s: Additional time of such an operation, times the product's smallest dimension.
        moved_s: A byte read or written by operations that are not products.
        crowd_s: Additional time of such a byte for every further rank on the machine: ranks share
            the memory's bandwidth and the last cache.
        kernel_s: Starting an operation, Python included.
        send_s: A byte between ranks.
        start_s: Starting a message or a collective.
        state_s: A byte that the optimizer reads or writes.
    """

    flop_s: float
    thin_s: float
    moved_s: float
    crowd_s: float
    kernel_s: float
    send_s: float
    start_s: float
    state_s: float

    def product_seconds(self, m: float, n: float, k: float, groups: int) -> float:
        """Products [m, k] x [k, n], `groups` of them, without their start."""
        flop = 2.0 * m * n * k * groups
        return flop * (self.flop_s + self.thin_s / min(m, n, k)) if flop else 0.0

    def among(self, ranks: int, cores: int) -> CpuRates:
        """The rates of each of `ranks` on a machine of `cores`; surplus ranks take turns."""
        turns = max(1.0, ranks / cores)
        moved = self.moved_s + self.crowd_s * (min(ranks, cores) - 1)
        values = {**asdict(self), "moved_s": moved, "crowd_s": 0.0}
        computing = ("flop_s", "thin_s", "moved_s", "kernel_s", "state_s")
        return CpuRates(**{k: v * turns if k in computing else v for k, v in values.items()})


def parse_rates(values: object, source: str) -> CpuRates:
    """Rates from a file's content.

    Args:
        values: Seconds by name.
        source: Their origin, for the error.

    Raises:
        ConfigError: If a name is missing or unknown, or a value is not a number of 0 or more.
    """
    names = [field.name for field in fields(CpuRates)]
    known = isinstance(values, dict) and sorted(values) == sorted(names)
    if not isinstance(values, dict) or not known:
        given = ", ".join(map(str, values)) if isinstance(values, dict) else str(values)
        raise ConfigError(
            f"{source}: rates ({given}) must give {', '.join(names)}; measure them with "
            "benchmarks/cpu_step_times.py"
        )
    for name, value in values.items():
        if not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ConfigError(
                f"{source}: {name} ({value}) must be a number of 0 or more, seconds; measure it "
                "with benchmarks/cpu_step_times.py"
            )
    return CpuRates(**values)
