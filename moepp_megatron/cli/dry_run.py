"""What `moepp train --dry-run` prints: grid, stages, parameters, without touching a device."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from moepp_megatron.config import Config, Layout, count_parameters, stage_layers
from moepp_megatron.planning.memory import rank_memory

# A large grid says nothing that its first and last ranks do not.
_MOST_ROWS = 32


def print_plan(config: Config, layout: Layout) -> None:
    """Print the parameters, the pipeline stages and where every rank stands."""
    console = Console()
    console.print(_parameters(config))
    console.print(_stages(config, layout))
    console.print(_grid(layout))
    console.print(
        f"{layout.num_microbatches} micro-batches of {config.training.micro_batch_size} sequences "
        f"a step and data-parallel rank; phi {config.moe.ffn_share:.3f}"
    )


def _parameters(config: Config) -> Table:
    counts = count_parameters(config)
    table = Table("part", title="parameters")
    table.add_column("number", justify="right")
    for name in (
        "embedding",
        "attention",
        "norms",
        "dense_ffn",
        "ffn_experts",
        "shared_experts",
        "router",
        "zero_computation_experts",
    ):
        number = getattr(counts, name)
        if number:
            table.add_row(name.replace("_", " "), f"{number:,}")
    table.add_row("total", f"{counts.total:,}", style="bold")
    table.add_row("active per token", f"{counts.active:,}")
    return table


def _stages(config: Config, layout: Layout) -> Table:
    """Layers by model chunk; E is the embedding, L the loss, as in layout strings."""
    table = Table(
        "stage",
        "layers",
        title="each rank of a pipeline stage, MiB",
        caption="activations and buffers are estimates for even routing (docs/planning.md)",
    )
    columns = ("parameters", "weights", "gradients", "optimizer", "activations", "buffers", "sum")
    for column in columns:
        table.add_column(column, justify="right")
    for stage, chunks in enumerate(stage_layers(config)):
        memory = rank_memory(config, layout, stage)
        names = [_layers(chunk) for chunk in chunks]
        if stage == 0:
            names[0] = f"E {names[0]}".strip()
        if stage == layout.pp - 1:
            names[-1] = f"{names[-1]} L".strip()
        sizes = (
            memory.weights,
            memory.gradients,
            memory.optimizer,
            memory.activations,
            memory.buffers,
            memory.total,
        )
        table.add_row(
            str(stage),
            " | ".join(name or "-" for name in names),
            f"{memory.dense + memory.experts:,}",
            *(f"{size / 2**20:,.1f}" for size in sizes),
        )
    return table


def _layers(chunk: list[int]) -> str:
    """Layer numbers from 0 as "4", "4-7" or nothing."""
    if not chunk:
        return ""
    return str(chunk[0]) if len(chunk) == 1 else f"{chunk[0]}-{chunk[-1]}"


def _grid(layout: Layout) -> Table:
    table = Table(title=f"{layout.world_size} ranks")
    for column in ("rank", "tp", "cp", "dp", "pp", "etp", "ep", "edp"):
        table.add_column(column, justify="right")
    ranks = layout.grid()
    shown = ranks if len(ranks) <= _MOST_ROWS else ranks[: _MOST_ROWS - 1] + ranks[-1:]
    for place in shown:
        if place is ranks[-1] and len(shown) < len(ranks):
            table.add_row(*["..."] * 8)
        values = (place.rank, place.tp, place.cp, place.dp, place.pp, place.etp, place.ep)
        table.add_row(*(str(value) for value in (*values, place.edp)))
    return table
