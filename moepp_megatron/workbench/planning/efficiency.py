"""Reached shares of the rated numbers, and fixed times: one set for all models and layouts.

Each number names its source. No source gives `bf16_matmul`, `fp8_matmul` and `kernel_s` separately;
they are set once for all published results together (docs/planning.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from moepp_megatron.config.errors import ConfigError

# "Scalable Training of Mixture-of-Experts Models with Megatron Core", arXiv 2603.07685:
# table 7 (dispatch and combine on H100), table 9 (attention), section 4.2 (overlap).


@dataclass(frozen=True)
class Efficiencies:
    """Reached shares of rated numbers; seconds where a name ends in `_s`.

    Attributes:
        bf16_matmul: Share of the bf16 rate, in a product that fills the GPU, in long training.
            Searching for the best shape finds 0.80 on an H100 (stas00/ml-engineering,
            compute/accelerator, MAMF table); power caps and ordinary shapes leave less in training.
        fp8_matmul: Share of the FP8 rate in the same case. Best shape 0.71 (same table).
        fp8_blockwise_matmul: The same with 128-wide scaling blocks, whose partial sums Hopper
            promotes outside the tensor cores.
        mxfp8_matmul: The same with scales of 32 elements, which Blackwell's tensor cores apply.
        fp32_matmul: Share of the fp32 rate.
        attention: Sequence length -> shares of the bf16 rate forward and backward, causal scores
            counted half. Paper, table 9: 553 and 422 TFLOP/s at 4,096; 638 and 523 at 16,384.
        attention_scale: Factor on these, for another GPU than an H100.
        depth: A product whose inner dimension is this long spends half its time on filling and
            draining the pipeline of its tiles.
        memory: Share of the memory bandwidth, in kernels that only move data. Copies reach 0.90 to
            0.92 on an H100; fused elementwise kernels and permutations less.
        nvlink: Share of NVLink's rate in one direction; network: that of a GPU's network port. Both
            from table 7: with them 14 of 16 times of plain and deduplicated exchanges on 8 to 64
            H100 come out within 8%, the deduplicated ones of 16 ranks 11% and 22% too fast
            (tests/unit/workbench/planning/test_links.py).
        nvlink_latency_s: Start of a collective inside a node; network_latency_s: across nodes;
            hop_s: each further node of a ring.
        kernel_s: Idle time and start-up of each kernel of a layer on the GPU, seconds.
        launch_s: Time in which the host issues a kernel that is in no CUDA graph: Python, autograd
            and Transformer Engine's modules included. A property of the host's processor.
        metadata_s: Exchange of how many tokens go where, once per forward pass of a dropless
            dispatcher over several ranks; ranks wait for each other here.
        metadata_beside_s: The same where another micro-batch computes meanwhile.
        overlap: Share of the experts' exchange that runs beside computation in the combined
            schedule, with DeepEP or HybridEP. Paper, section 4.2.3: 0.93.
        plain_overlap: The same of an all-to-all of NCCL.
        overlap_slowdown: Slowdown of computation beside it, whose kernels occupy multiprocessors.
            Paper, section 4.2: about a fifth of the products' efficiency with 20 of 132.
        point_to_point_overlap: Share of stage-to-stage transfers that the interleaved schedule
            hides in its steady state.
        reserved_gib: Device memory outside the allocator's tensors: CUDA context, NCCL and library
            workspaces.
        memory_margin: Share of the device memory that a plan leaves free: fragmentation, and the
            estimate's own error (docs/planning.md, "Memory").
    """

    bf16_matmul: float = 0.68
    fp8_matmul: float = 0.60
    fp8_blockwise_matmul: float = 0.50
    mxfp8_matmul: float = 0.60
    fp32_matmul: float = 0.80
    attention: tuple[tuple[int, float, float], ...] = (
        (4096, 553 / 989.4, 422 / 989.4),
        (16384, 638 / 989.4, 523 / 989.4),
    )
    attention_scale: float = 1.0
    depth: float = 128.0
    memory: float = 0.80
    nvlink: float = 0.72
    network: float = 0.90
    nvlink_latency_s: float = 15e-6
    network_latency_s: float = 30e-6
    hop_s: float = 2e-6
    kernel_s: float = 2e-6
    launch_s: float = 32e-6
    metadata_s: float = 1e-3
    metadata_beside_s: float = 0.22e-3
    overlap: float = 0.93
    plain_overlap: float = 0.58
    overlap_slowdown: float = 0.20
    point_to_point_overlap: float = 0.5
    reserved_gib: float = 4.0
    memory_margin: float = 0.02

    def attention_share(self, seq: int, backward: bool) -> float:
        """Share of the bf16 rate in the attention's core, interpolated in the sequence length.

        Below the table it is extrapolated in the logarithm of the length, above the table it stays
        at the last value.
        """
        from math import log2

        (short, *low), (long, *high) = self.attention[0], self.attention[-1]
        place = (log2(max(seq, 1)) - log2(short)) / (log2(long) - log2(short))
        index = 1 if backward else 0
        share = low[index] + (high[index] - low[index]) * min(place, 1.0)
        return self.attention_scale * max(share, 0.25 * low[index])

    @classmethod
    def of(cls, values: Mapping[str, float], source: str) -> Efficiencies:
        """The usual ones, some of them changed.

        Args:
            values: Numbers by name, such as those of a hardware file's `reached:`.
            source: Where they come from, for the error.

        Raises:
            ConfigError: If a name is unknown, or a value is not a finite number above 0.
        """
        known = {field.name for field in fields(cls)} - {"attention"}
        for name, value in values.items():
            if name not in known:
                raise ConfigError(
                    f"{source}: reached.{name} ({value}) must be one of "
                    f"{', '.join(sorted(known))}; use one of these names"
                )
            if not 0 < value < float("inf"):
                raise ConfigError(
                    f"{source}: reached.{name} ({value}) must be a finite number above 0; "
                    "correct it"
                )
        changed: dict[str, Any] = dict(values)
        return cls(**changed)


DEFAULT = Efficiencies()
