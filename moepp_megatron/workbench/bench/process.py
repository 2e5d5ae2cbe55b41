"""Sets up one process with Megatron's groups, which a layer needs to be built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moepp_megatron.config import Layout
from moepp_megatron.runtime import distributed
from moepp_megatron.runtime.rank import RankEnvironment
from moepp_megatron.workbench.bench.contestants import layer_config
from moepp_megatron.workbench.bench.shapes import SHAPES


@contextmanager
def single_process() -> Iterator[None]:
    """A context with groups of one rank, destroyed at the end."""
    distributed.start(RankEnvironment())
    try:
        any_config = layer_config(
            SHAPES["0.6B"], 0.75, "fp32", vanilla=False, dispatcher="alltoall"
        )
        distributed.build_groups(any_config, Layout.from_config(any_config, 1))
        yield
    finally:
        distributed.stop()
