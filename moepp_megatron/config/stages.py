"""Transformer layers of each pipeline stage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moepp_megatron.config.schema import Config


# Layer numbers (from 0) by pipeline rank and, within it, by model chunk.
Stages = tuple[tuple[tuple[int, ...], ...], ...]

# Longest repetition in a layout string; a typo such as *99999999 must not fill the memory.
_MOST_REPEATS = 10_000
_GROUP = re.compile(r"\(([^)]+)\)\*(\d+)")
_SINGLE = re.compile(r"(.)\*(\d+)")


def expand_pipeline_layout(text: str) -> list[str]:
    """Expand megatron-core's layout string to one string per stage.

    `E` is the embedding, `t` a transformer layer, `m` one of multi-token prediction, `L` the loss,
    `|` ends a stage, `x*n` and `(..)*n` repeat, commas are ignored. `E(t|)*2,tL` gives `["Et", "t",
    "tL"]`. ValueError if a character has no meaning, or there are more than 10,000 repetitions.
    Source: `parse_str_to_list` in megatron/core/transformer/pipeline_parallel_layer_layout.py.
    """
    expanded = text.replace(",", "")
    for pattern in (_GROUP, _SINGLE):
        expanded = pattern.sub(_repeat, expanded)
    unknown = sorted(set(expanded) - set("EtmL|"))
    if unknown:
        raise ValueError(f"holds {''.join(unknown)!r}")
    return expanded.split("|")


def _repeat(match: re.Match[str]) -> str:
    """The text of one repetition, written out."""
    count = int(match.group(2))
    if count > _MOST_REPEATS:
        raise ValueError(f"repeats {count} times")
    return match.group(1) * count


def virtual_stages(config: Config) -> int:
    """Model chunks per pipeline rank: the setting, or the layout string's number, else 1."""
    parallel = config.parallel
    if parallel.pipeline_model_parallel_layout is not None:
        stages = expand_pipeline_layout(parallel.pipeline_model_parallel_layout)
        return len(stages) // parallel.pipeline_model_parallel_size
    return parallel.virtual_pipeline_model_parallel_size or 1


def stage_layers(config: Config) -> Stages:
    """Layer numbers (from 0) by pipeline rank and, within it, by model chunk.

    Chunk `v` of rank `p` is stage `v * PP + p`, as in megatron-core's interleaved schedule.
    """
    pp = config.parallel.pipeline_model_parallel_size
    vpp = virtual_stages(config)
    layout = config.parallel.pipeline_model_parallel_layout
    if layout is not None:
        sizes = [stage.count("t") for stage in expand_pipeline_layout(layout)]
    else:
        sizes = [config.model.num_layers // (pp * vpp)] * (pp * vpp)
    return stages_of(sizes, pp)


def stages_of(sizes: Sequence[int], pp: int) -> Stages:
    """Layer numbers by pipeline rank and chunk from the sizes of all stages in order."""
    starts = [sum(sizes[:stage]) for stage in range(len(sizes))]
    stages = [tuple(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    return tuple(tuple(stages[rank::pp]) for rank in range(pp))
