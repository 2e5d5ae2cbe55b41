"""The link that a process group's messages take, and the bandwidth that a call could reach."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from moepp_megatron.config import ConfigError
from moepp_megatron.config.hardware import Hardware, find_hardware
from moepp_megatron.config.json_file import read_json
from moepp_megatron.workbench.profiling.collective import Collective, Operation, bus_factor
from moepp_megatron.workbench.profiling.trace import RankTrace

# Bus bandwidth in GB/s that a call could reach; None where nobody has measured it.
MeasuredPeak = Callable[[Collective], float | None]


@dataclass(frozen=True)
class Link:
    """A kind of link.

    Attributes:
        name: NVLink, network, or this machine if it has no GPU.
        peak_gb_s: Rated bandwidth of one direction of a GPU, 1e9 bytes/s; None where unknown.
    """

    name: str
    peak_gb_s: float | None = None


def link_peaks(hardware: Hardware | None) -> dict[str, float | None]:
    """Rated GB/s of a GPU in one direction, by `nvlink` and `network`; None where unknown."""
    both = hardware.nvlink_gb_s if hardware else None
    bits = hardware.network_gbit_s_per_gpu if hardware else None
    # NVLink is rated with both directions added; nccl-tests' bus bandwidth is that of one.
    return {"nvlink": both / 2 if both else None, "network": bits / 8 if bits else None}


class Links:
    """Which link each call takes, by the nodes and the GPU that the traces name."""

    def __init__(self, traces: list[RankTrace]) -> None:
        self._on_gpu = any(trace.on_gpu for trace in traces)
        self._nodes = traces[0].about.nodes
        self.hardware = find_hardware(traces[0].about.device) if self._on_gpu else None

    def of(self, call: Collective) -> Link:
        """The slowest link that the group's messages must take."""
        nodes = {
            self._nodes[rank] if rank < len(self._nodes) else None for rank in call.group_ranks
        }
        if not nodes or None in nodes:
            return Link("unknown")
        if not self._on_gpu:
            return Link("this machine" if len(nodes) == 1 else "network")
        peaks = link_peaks(self.hardware)
        if len(nodes) == 1:
            return Link("NVLink", peaks["nvlink"])
        return Link("network", peaks["network"])


class _Measured(BaseModel):
    """What counts here of a record of `bench.links.measure`."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    operation: Operation
    group_size: int = Field(ge=2)
    size_bytes: int = Field(ge=1)
    time_us: float = Field(gt=0.0)


def read_ceiling(path: Path) -> MeasuredPeak:
    """The bus bandwidth that an operation reached alone, by a file of `workbench.bench.links`.

    It is of the same operation in a group of the same size. Between two measured message sizes
    time grows in proportion to the bytes; below the smallest its time is taken, above the largest
    its bandwidth.

    Raises:
        ConfigError: The file cannot be read, or holds something else.
    """
    remedy = "write it with: torchrun ... -m moepp_megatron.workbench.bench.links FILE"
    try:
        records = TypeAdapter(list[_Measured]).validate_python(read_json(path))
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
    times: defaultdict[tuple[Operation, int], dict[int, float]] = defaultdict(dict)
    for row in records:
        fastest = times[row.operation, row.group_size]
        fastest[row.size_bytes] = min(row.time_us, fastest.get(row.size_bytes, row.time_us))

    def peak(call: Collective) -> float | None:
        receives = call.operation is Operation.RECEIVE
        operation = Operation.SEND if receives else call.operation
        measured = sorted(times.get((operation, call.group_size), {}).items())
        if not measured or not call.size:
            return None
        factor = bus_factor(operation, call.group_size)
        return factor * call.size / _time_at(measured, call.size) / 1e3

    return peak


def _time_at(points: list[tuple[int, float]], size: int) -> float:
    """Microseconds at `size` bytes, from (bytes, microseconds) in ascending order."""
    (first_size, first_time), (last_size, last_time) = points[0], points[-1]
    if size <= first_size:
        return first_time
    if size >= last_size:
        return last_time * size / last_size
    for (below, time_below), (above, time_above) in itertools.pairwise(points):
        if size <= above:
            return time_below + (time_above - time_below) * (size - below) / (above - below)
    raise AssertionError("a size between the first and the last lies between two of them")
