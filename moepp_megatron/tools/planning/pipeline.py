"""Pipeline schedules: idle time, micro-batches in flight, layers of each stage."""

from functools import lru_cache

from moepp_megatron.config.stages import Stages, stages_of


def split_passes(pp: int, vpp: int, micro_batches: int, is_combined: bool) -> tuple[float, float]:
    """Passes of the whole slowest stage that run unpaired, and with an opposite pass.

    Both count forward and backward of a micro-batch as one. The combined schedule's last rank runs
    (v - 1) p + 1 forward passes of a chunk before its first pair and as many backward passes after
    its last. Earlier ranks run more of them alone, while they would have to wait: the path that
    decides a step has (v - 1) p + 1 through whichever rank (megatron-core, combined_1f1b.py).
    """
    if not is_combined:
        return micro_batches, 0.0
    unpaired = min(((vpp - 1) * pp + 1) / vpp, micro_batches)
    return unpaired, micro_batches - unpaired


def bubble_seconds(others: float, vpp: int, is_dualpipe: bool = False) -> float:
    """Idle time of the slowest rank, while the first micro-batch arrives and the last one leaves.

    Each passes one chunk of every other rank per direction, `others` seconds for all their chunks:
    p - 1 passes of equal stages under 1F1B, (p - 1) / v interleaved (arXiv 2104.04473, 2.2).
    DualPipe's enter at both ends (arXiv 2412.19437, table 2): p / 2 - 1 pairs, less the weights'
    gradients that fill them.
    """
    if is_dualpipe:
        # Forward, gradients of inputs and of weights take a third of a pass each.
        return others / 2 * 2 / 3
    return others / vpp


def late_messages(pp: int, vpp: int, together: float) -> float:
    """Messages on the critical path of a step that nothing hides.

    Where the pipeline fills and drains, a micro-batch goes through all vp stages and no stage has
    anything else to do. A pair's two results are there at once, just when the next stage is free
    for them; single passes of both ways in turn leave each message the time of a pass.
    """
    between_pairs = max(together * vpp - 1, 0.0)
    return 2 * (pp * vpp - 1) + between_pairs


def chunks_in_flight(pp: int, vpp: int, rank: int, micro_batches: int) -> float:
    """Largest number of (micro-batch, model chunk) pairs whose activations `rank` holds.

    1F1B warms up p - 1 - rank micro-batches, the interleaved schedule 2 (p - 1 - rank) + (v - 1) p
    chunks (schedules.py, `get_pp_rank_microbatches`); one more is at work. The combined schedule
    holds as many: in a pair, the backward pass frees what the forward pass takes.
    """
    if vpp == 1:
        return min(pp - rank, micro_batches)
    warm_up = 2 * (pp - 1 - rank) + (vpp - 1) * pp
    return min(warm_up + 1, micro_batches * vpp)


def _stage_sizes(layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage: equal, or with embedding and loss counted as a layer each."""
    if layers % stages == 0:
        return (layers // stages,) * stages
    units, more = divmod(layers + 2, stages)
    sizes = [units] * stages
    # Larger stages in the middle: the ends have the embedding and the loss.
    start = (stages - more) // 2
    for stage in range(start, start + more):
        sizes[stage] += 1
    sizes[0] -= 1
    sizes[-1] -= 1
    return tuple(sizes)


@lru_cache(maxsize=4096)
def even_stages(layers: int, pp: int, vpp: int) -> Stages:
    """Layer numbers by pipeline rank and, within it, by chunk; as `config.stages.stage_layers`."""
    return stages_of(_stage_sizes(layers, pp * vpp), pp)


def layout_string(layers: int, stages: int) -> str:
    """megatron-core's layout string, such as `Et|tt|tL`."""
    return f"E{'|'.join('t' * size for size in _stage_sizes(layers, stages))}L"
