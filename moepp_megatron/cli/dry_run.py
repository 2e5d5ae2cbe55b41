"""Prints the output of `moepp train --dry-run`: grid, stages, parameters, without any device."""

from rich.table import Table

from moepp_megatron.cli.memory_fit import GIB, Target, fits, needed_bytes, target_of
from moepp_megatron.config import Config, Layout, count_parameters, stage_layers
from moepp_megatron.tools.planning.machine import DEFAULT
from moepp_megatron.tools.planning.memory import RankMemory, rank_memory
from moepp_megatron.tools.report.terminal import plain_table, print_uncut

# Of a large grid the first and last ranks suffice.
_MOST_RANKS = 16
_EXACT = ("weights", "gradients", "optimizer")
_PARTS = (*_EXACT, "activations", "buffers")


def print_plan(config: Config, layout: Layout, gpu: str | None = None) -> None:
    """Print the parameters, the pipeline stages, their memory and the coordinates of ranks.

    Args:
        config: A checked configuration.
        layout: The layout, of any number of ranks.
        gpu: The GPU whose memory is meant, see `target_of`; None for the usual rules.

    Raises:
        ConfigError: If there is no such GPU.
    """
    target = target_of(config, gpu)
    stages = [rank_memory(config, layout, p) for p in range(layout.pp)]
    device = "this machine's CPU" if target.hardware is None else target.hardware.name
    print_uncut(
        _parameters(config),
        "\nLayers, counted from 1, by pipeline stage (E embedding, "
        f"{'m multi-token prediction, ' if config.model.mtp_num_layers else ''}L loss, | between "
        "chunks)",
        _stages(config, stages),
        f"\nMemory of a rank on {device} ({target.reason})",
        _memory(stages, target),
        _fit(stages, target),
        f"\n{_number(layout.world_size, 'rank', 'ranks')}",
        _grid(layout),
        f"\n{_number(layout.num_microbatches, 'micro-batch', 'micro-batches')} of "
        f"{_number(config.training.micro_batch_size, 'sequence', 'sequences')} a step and "
        f"data-parallel rank; phi {config.moe.ffn_share:.3f}",
        f"\nSchedule (optimizer.decay_style {config.optimizer.decay_style})",
    )
    # Last, because it takes seconds.
    print_uncut(*_schedule_lines(config))


def _number(count: int, one: str, several: str) -> str:
    return f"{count:,} {one if count == 1 else several}"


def _parameters(config: Config) -> Table:
    counts = count_parameters(config)
    table = plain_table("part", "parameters", words=1)
    for name, number in counts.parts.items():
        if number:
            table.add_row(name.replace("_", " "), f"{number:,}")
    table.add_row("total", f"{counts.total:,}", style="bold")
    table.add_row("active per token", f"{counts.active:,}")
    return table


def _stages(config: Config, stages: list[RankMemory]) -> Table:
    """Layers by model chunk; E, m and L as in megatron-core's layout strings."""
    table = plain_table("stage", "parameters of a rank")
    table.add_column("layers", overflow="fold")
    for stage, (chunks, memory) in enumerate(zip(stage_layers(config), stages, strict=True)):
        names = [_layers(chunk) for chunk in chunks]
        if stage == 0:
            names[0] = f"E {names[0]}".strip()
        if stage == len(stages) - 1:
            names[-1] = f"{names[-1]} {'m' * config.model.mtp_num_layers}".strip()
            names[-1] = f"{names[-1]} L".strip()
        count = memory.dense + memory.experts
        table.add_row(str(stage), f"{count:,}", " | ".join(name or "-" for name in names))
    return table


def _layers(chunk: tuple[int, ...]) -> str:
    """Layers, numbered from 1, as "5", "5-8" or nothing; `chunk` numbers them from 0."""
    if not chunk:
        return ""
    first, last = chunk[0] + 1, chunk[-1] + 1
    return str(first) if first == last else f"{first}-{last}"


def _memory(stages: list[RankMemory], target: Target) -> Table:
    """Memory of a rank of each stage: in GiB, or in MiB on a CPU if all of it is small."""
    # On a CPU what is kept for the backward pass is not estimated.
    parts: tuple[str, ...] = _EXACT if target.hardware is None else _PARTS
    if any(memory.teacher for memory in stages):
        parts += ("teacher",)
    rows = [[getattr(memory, part) for part in parts] for memory in stages]
    is_small = target.hardware is None and max(map(sum, rows)) < GIB
    unit, size, digits = ("MiB", 2**20, 1) if is_small else ("GiB", GIB, 2)
    table = plain_table("stage", *parts, f"sum, {unit}")
    for stage, sizes in enumerate(rows):
        table.add_row(
            str(stage), *(f"{value / size:,.{digits}f}" for value in (*sizes, sum(sizes)))
        )
    return table


def _fit(stages: list[RankMemory], target: Target) -> str:
    """Say if the fullest rank fits the GPU, by the rule of `moepp plan`."""
    if target.hardware is None:
        return "activations are not estimated on a CPU; --gpu NAME estimates those on a GPU"
    needed = needed_bytes(stages)
    text = (
        "activations and buffers: estimates for even routing (docs/planning.md)\n"
        f"fullest rank: {_size(needed)}, of these {DEFAULT.reserved_gib:g} GiB for CUDA, NCCL and "
        "fragmentation: "
    )
    room = target.memory_bytes
    if room is None:
        return f"{text}the memory of {target.hardware.name} is not known"
    verdict = "fits" if fits(needed, target) else "DOES NOT FIT"
    return f"{text}{verdict} {_size(room)} less {DEFAULT.memory_margin:.0%}"


def _size(count: float) -> str:
    return f"{count / GIB:,.2f} GiB"


def _grid(layout: Layout) -> Table:
    table = plain_table("rank", "tp", "cp", "dp", "pp", "etp", "ep", "edp")
    count = layout.world_size
    shown = range(count if count <= _MOST_RANKS else _MOST_RANKS - 2)
    for rank in (*shown, *range(max(len(shown), count - 1), count)):
        if rank > len(shown):
            table.add_row(*["..."] * 8)
        at = layout.coordinates(rank)
        values = (at.rank, at.tp, at.cp, at.dp, at.pp, at.etp, at.ep, at.edp)
        table.add_row(*map(str, values))
    return table


def _schedule_lines(config: Config) -> list[str]:
    """The learning rate, and the batch size where it is ramped.

    megatron-core computes both, so this takes the seconds that its import takes.
    """
    from moepp_megatron.runtime.optional import quiet

    quiet()
    from moepp_megatron.training.schedule import BatchSizes, learning_rate

    last = config.training.train_iters
    # The rate is highest in the last step of warmup.
    top = max(config.warmup_iters, 1)
    steps = sorted({1, top, *(max(last * part // 4, 1) for part in range(1, 5))})
    rates = (f"{learning_rate(config, step):.3g} at step {step:,}" for step in steps)
    lines = [f"learning rate  {', '.join(rates)}"]
    if config.training.batch_ramp is not None:
        batches = BatchSizes(config)
        first, *stages = batches.stages()
        later = "".join(f", {stage.size:,} from step {stage.first_step:,}" for stage in stages)
        tokens = batches.planned_samples() * config.model.seq_length
        lines.append(f"batch          {first.size:,} sequences{later}; {tokens:,} tokens in all")
    return lines
