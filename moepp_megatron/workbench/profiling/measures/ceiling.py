"""The measured peak of a link, from `moepp bench collectives --json FILE` on this machine.

A profile's bus bandwidth is compared with that of the same operation running alone, in a group of
the same size, at the same message size. Between two measured sizes the time is taken to grow in
proportion to the bytes, as latency plus bytes over bandwidth does.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from moepp_megatron.config import ConfigError
from moepp_megatron.config.json_file import read_json
from moepp_megatron.workbench.profiling.collective import Operation, bus_factor

# Operation, ranks of the group, whether all ranks send the same to all.
_Key = tuple[Operation, int, bool]


class _Record(BaseModel):
    """The fields of `bench.collectives.CollectiveResult` that count here."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    operation: Operation
    even: bool = True
    group_size: int = Field(ge=2)
    size_bytes: int = Field(ge=1)
    time_us: float = Field(gt=0.0)


@dataclass(frozen=True)
class Ceiling:
    """Times by operation and group.

    Attributes:
        points: For each operation, group size and evenness: (bytes, microseconds), sizes
            ascending, each once; the fastest of several measurements of a size.
    """

    points: Mapping[_Key, tuple[tuple[int, float], ...]]

    @classmethod
    def read(cls, path: Path) -> Ceiling:
        """Read FILE of `moepp bench collectives --json FILE`.

        Raises:
            ConfigError: If it cannot be read or is not such a file.
        """
        remedy = "write it with: moepp bench collectives --json FILE"
        try:
            content = read_json(path)
            records = TypeAdapter(list[_Record]).validate_python(content)
        except OSError as error:
            raise ConfigError(
                f"ceiling ({path}) must be a readable file ({error.strerror}); {remedy}"
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "content"
            raise ConfigError(
                f"ceiling ({path}) must hold measured collectives, and {where} does not fit "
                f"({first['msg']}); {remedy}"
            ) from None
        except ValueError:
            raise ConfigError(f"ceiling ({path}) must be JSON; {remedy}") from None
        return cls.of(records)

    @classmethod
    def of(cls, records: Iterable[Any]) -> Ceiling:
        """Build it from records with `operation`, `even`, `group_size`, `size_bytes`, `time_us`."""
        times: defaultdict[_Key, dict[int, float]] = defaultdict(dict)
        for r in records:
            of_key = times[Operation(r.operation), r.group_size, r.even]
            of_key[r.size_bytes] = min(r.time_us, of_key.get(r.size_bytes, r.time_us))
        return cls({key: tuple(sorted(of_key.items())) for key, of_key in times.items()})

    def bus_bandwidth(
        self, operation: Operation, group_size: int, size: int, even: bool = True
    ) -> float | None:
        """GB/s (1e9 bytes) of the bus, by nccl-tests' formula, at `size` bytes.

        Below the smallest measured size its time is taken, above the largest its bandwidth.

        Returns:
            None where this operation was not measured in a group of this size.
        """
        points = self._points(operation, group_size, even)
        if not points or size < 1:
            return None
        factor = bus_factor(operation, group_size)
        return factor * size / _time_at(points, size) / 1e3

    def peak(self, operation: Operation, group_size: int) -> float | None:
        """The largest bus bandwidth over all sizes, GB/s; None where nothing was measured."""
        points = self._points(operation, group_size, even=True)
        if not points:
            return None
        factor = bus_factor(operation, group_size)
        return max(factor * size / microseconds / 1e3 for size, microseconds in points)

    def group_sizes(self, operation: Operation) -> list[int]:
        """Group sizes in which `operation` was measured, ascending."""
        wanted = _measured_as(operation)
        return sorted({ranks for found, ranks, _ in self.points if found is wanted})

    def _points(
        self, operation: Operation, group_size: int, even: bool
    ) -> tuple[tuple[int, float], ...]:
        return self.points.get((_measured_as(operation), group_size, even), ())


def _measured_as(operation: Operation) -> Operation:
    """The operation under which it was measured: sending and receiving are measured together."""
    return Operation.SEND if operation is Operation.RECEIVE else operation


def _time_at(points: tuple[tuple[int, float], ...], size: int) -> float:
    """Microseconds at `size` bytes."""
    (first_size, first_time), (last_size, last_time) = points[0], points[-1]
    if size <= first_size:
        return first_time
    if size >= last_size:
        return last_time * size / last_size
    for (below, time_below), (above, time_above) in itertools.pairwise(points):
        if size <= above:
            return time_below + (time_above - time_below) * (size - below) / (above - below)
    raise AssertionError("a size between the first and the last lies between two of them")
