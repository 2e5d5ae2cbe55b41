"""What `moepp train --dry-run` prints: grid, stages, parameters, without touching a device.

With `--build-rank` it builds that rank too, and compares.
"""

from __future__ import annotations

from rich.table import Table

from moepp_megatron.config import Config, Layout, count_parameters, stage_layers
from moepp_megatron.planning.memory import rank_memory
from moepp_megatron.planning.workload import Modules
from moepp_megatron.runtime.nvml import Nvml, NvmlUnavailableError
from moepp_megatron.runtime.terminal import Console

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


def build_and_check(config: Config, layout: Layout, rank: int) -> bool:
    """Build a rank of the layout on this machine, print every comparison with the plan.

    Args:
        config: A checked configuration.
        layout: On any number of ranks.
        rank: The rank to build.

    Returns:
        All agree.

    Raises:
        UnfitError: The model has modules that this machine lacks packages for.
    """
    from moepp_megatron.runtime.fit import check_fit

    check_fit(config)
    from moepp_megatron.runtime.quiet import quiet

    quiet()
    from moepp_megatron.planning.built_rank.build import build_rank
    from moepp_megatron.planning.built_rank.check import check_rank
    from moepp_megatron.planning.workload import Workload

    built = build_rank(config, layout, rank)
    table = Table("", "built", "expected", "", title=f"rank {rank} of {layout.world_size:,}, built")
    checks = check_rank(config, layout, built)
    for check in checks:
        style = None if check.holds else "bold red"
        verdict = "same" if check.holds else "DIFFERS"
        table.add_row(check.name, check.built, check.expected, verdict, style=style)
    console = Console()
    console.print(table)
    numbers = Workload.from_config(config).numbers
    state = 2 * numbers.moment_bytes + numbers.master_bytes
    console.print(
        f"gradients with what aligns them: {built.aligned_bytes:,} bytes; optimizer state of this "
        f"rank's own shard: {built.shard * state:,} bytes",
        soft_wrap=True,
    )
    return all(check.holds for check in checks)


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
    modules = _modules_here()
    kind = "GPUs"
    if modules == "local":
        most = max(rank_memory(config, layout, stage).total for stage in range(layout.pp))
        kind = f"this machine's CPU (a rank on a GPU: at most {most / 2**20:,.1f} MiB)"
    table = Table(
        "stage",
        "layers",
        title="each rank of a pipeline stage, MiB",
        caption=f"activations and buffers: estimates for {kind} and even routing "
        "(docs/planning.md)",
    )
    columns = ("parameters", "weights", "gradients", "optimizer", "activations", "buffers", "sum")
    for column in columns:
        table.add_column(column, justify="right")
    for stage, chunks in enumerate(stage_layers(config)):
        memory = rank_memory(config, layout, stage, modules)
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


def _modules_here() -> Modules:
    """What a run on this machine would compute with."""
    try:
        with Nvml() as nvml:
            has_card = nvml.count() > 0
    except NvmlUnavailableError:
        has_card = False
    return "fused" if has_card else "local"


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
