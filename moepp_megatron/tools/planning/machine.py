"""A cluster of one kind of GPU: rated numbers times reached shares, and fixed times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import log2
from typing import Any

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.hardware import Hardware

# "Scalable Training of Mixture-of-Experts Models with Megatron Core", arXiv 2603.07685:
# table 7 (dispatch and combine on H100), table 9 (attention), section 4.2 (overlap).


@dataclass(frozen=True)
class _Efficiencies:
    """Reached shares of rated numbers; seconds where a name ends in `_s`."""

    # Share of the bf16 rate in a product that fills the GPU. The best shape reaches 0.80 on an H100
    # (stas00/ml-engineering, compute/accelerator, MAMF table); long training leaves less.
    bf16_matmul: float = 0.68
    # Share of the FP8 rate in the same case. Best shape 0.71 (same table).
    fp8_matmul: float = 0.60
    # With 128-wide scaling blocks, whose partial sums Hopper promotes outside the tensor cores.
    fp8_blockwise_matmul: float = 0.50
    # The same with scales of 32 elements, which Blackwell's tensor cores apply.
    mxfp8_matmul: float = 0.60
    fp32_matmul: float = 0.80  # share of the fp32 rate
    # Sequence length, shares of the bf16 rate forward and backward, causal scores counted half
    # (paper, table 9).
    attention: tuple[tuple[int, float, float], ...] = (
        (4096, 553 / 989.4, 422 / 989.4),
        (16384, 638 / 989.4, 523 / 989.4),
    )
    attention_scale: float = 1.0  # factor on these, for another GPU than an H100
    # An inner dimension as long spends half the time on filling and draining the tiles' pipeline.
    depth: float = 128.0
    # Share of the bandwidth in kernels that only move data; copies reach 0.90 to 0.92 on an H100.
    memory: float = 0.80
    # Share of NVLink's rate in one direction, of a GPU's network port. Both from table 7: 14 of 16
    # times on 8 to 64 H100 come out within 8% (tests/unit/tools/planning/test_links.py).
    nvlink: float = 0.72
    network: float = 0.90
    # Start of a collective in a node, across nodes, and of each further node of a ring.
    nvlink_latency_s: float = 15e-6
    network_latency_s: float = 30e-6
    hop_s: float = 2e-6
    kernel_s: float = 2e-6  # idle time and start-up of each kernel of a layer on the GPU, seconds
    # In which the host issues a kernel that is in no CUDA graph, Python and autograd included.
    launch_s: float = 32e-6
    # How many tokens go where, once a forward pass of a dropless dispatcher: ranks wait here.
    metadata_s: float = 1e-3
    metadata_overlapped_s: float = 0.22e-3  # the same where another micro-batch computes meanwhile
    # Share of DeepEP's or HybridEP's exchange during computation in the combined schedule (4.2.3).
    overlap: float = 0.93
    plain_overlap: float = 0.58  # the same of an all-to-all of NCCL
    # Of computation during it, whose kernels occupy 20 of 132 multiprocessors (paper, section 4.2).
    overlap_slowdown: float = 0.20
    # Share of stage-to-stage transfers that the interleaved schedule hides in its steady state.
    point_to_point_overlap: float = 0.5
    # Device memory outside the allocator's tensors: CUDA context, NCCL and library workspaces.
    reserved_gib: float = 4.0
    # Share of the device memory that a plan leaves free: fragmentation, the estimate's own error.
    memory_margin: float = 0.02

    def attention_share(self, seq: int, backward: bool) -> float:
        """Share of the bf16 rate in the attention's core, by the logarithm of the length."""
        (short, *low), (long, *high) = self.attention[0], self.attention[-1]
        place = (log2(max(seq, 1)) - log2(short)) / (log2(long) - log2(short))
        index = 1 if backward else 0
        share = low[index] + (high[index] - low[index]) * min(place, 1.0)
        return self.attention_scale * max(share, 0.25 * low[index])

    @classmethod
    def of(cls, values: Mapping[str, float], source: str) -> _Efficiencies:
        """Change the usual ones; ConfigError for an unknown name or no finite number above 0."""
        known = {field.name for field in fields(cls)} - {"attention"}
        for name, value in values.items():
            if name not in known:
                raise ConfigError(
                    f"{source}: reached.{name} ({value}) must be one of "
                    f"{', '.join(sorted(known))}; use one of these names"
                )
            if not 0 < value < float("inf"):
                rule = "must be a finite number above 0"
                raise ConfigError(f"{source}: reached.{name} ({value}) {rule}; correct it")
        changed: dict[str, Any] = dict(values)
        return cls(**changed)


DEFAULT = _Efficiencies()
_NEEDED = ("memory_gb", "memory_bandwidth_gb_s", "network_gbit_s_per_gpu", "gpus_per_node")


# Compared by identity: it is the key of caches, and one plan has one machine.
@dataclass(frozen=True, eq=False)
class Machine:
    """Reached rates of a GPU, in SI units."""

    hardware: Hardware  # the description it comes from
    reached: _Efficiencies  # shares of the rated numbers
    multiprocessors: int  # multiprocessors of a GPU
    memory_bytes: float  # device memory
    memory_rate: float  # bytes per second in kernels that only move data
    nvlink: float  # bytes per second and direction inside a node
    network: float  # bytes per second and direction of a GPU's port
    per_node: int  # GPUs of a node

    @classmethod
    def of(cls, hardware: Hardware, reached: _Efficiencies | None = None) -> Machine:
        """A description's machine with `reached` or its own; ConfigError if a number is missing."""
        lacking = [name for name in _NEEDED if getattr(hardware, name) is None]
        if lacking:
            raise ConfigError(
                f"hardware ({hardware.name}) must give {', '.join(lacking)} for a plan; add "
                f"{'it' if len(lacking) == 1 else 'them'} to a YAML file of your own and name that"
            )
        reached = reached or _Efficiencies.of(hardware.reached, f"hardware ({hardware.name})")
        network = (hardware.network_gbit_s_per_gpu or 0.0) / 8 * 1e9 * reached.network
        nvlink = hardware.nvlink_gb_s
        return cls(
            hardware=hardware,
            reached=reached,
            multiprocessors=hardware.multiprocessors or 1,
            memory_bytes=hardware.memory_bytes or 0.0,
            memory_rate=(hardware.memory_bandwidth_gb_s or 0.0) * 1e9 * reached.memory,
            # Without NVLink the GPUs of a node reach each other no faster than the network.
            nvlink=nvlink / 2 * 1e9 * reached.nvlink if nvlink else network,
            network=network,
            per_node=hardware.gpus_per_node or 1,
        )

    @property
    def usable_bytes(self) -> float:
        """Device memory that a plan may fill."""
        return self.memory_bytes * (1.0 - self.reached.memory_margin)

    def flops(self, number: str) -> float:
        """FLOP/s of products that fill the GPU: fp32, bf16, fp8, fp8_blockwise or mxfp8."""
        share: float = getattr(self.reached, f"{number}_matmul")
        return self.rated_flops(number) * share

    def rated_flops(self, number: str) -> float:
        """Rated FLOP/s of a format."""
        fp8 = None if number in ("fp32", "bf16") else number
        tflops = self.hardware.peak_tflops(number, fp8)
        assert tflops is not None, f"{self.hardware.name} has no {number} rate"
        return tflops * 1e12
