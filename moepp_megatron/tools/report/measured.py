"""`moepp plan --measured` on the terminal."""

from collections import defaultdict
from collections.abc import Sequence
from difflib import get_close_matches

from rich import box
from rich.table import Table

from moepp_megatron.tools.planning.measured.compare import (
    Comparison,
    FamilyErrors,
    family_errors,
    pair_errors,
)
from moepp_megatron.tools.planning.measured.rows import Beyond, MeasuredRow
from moepp_megatron.tools.report.terminal import print_uncut, titled_table


def print_measured(comparisons: Sequence[Comparison]) -> None:
    """Print predicted and measured, errors by family, and ratios of pairs."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("run", overflow="fold")
    table.add_column("scope")
    for name in ("tok/s/GPU", "measured", "error", "GiB", "measured", "step s"):
        table.add_column(name, justify="right", no_wrap=True)
    for comparison in comparisons:
        run = comparison.run
        measured, peak = run.tokens_per_s_per_gpu, run.row.measured.peak_memory_gib
        table.add_row(
            comparison.run.row.name,
            comparison.run.row.scope,
            f"{comparison.tokens_per_s_per_gpu:,.0f}",
            "-" if measured is None else f"{measured:,.0f}",
            "-" if comparison.error is None else f"{comparison.error:+.1%}",
            f"{comparison.memory_gib:.1f}",
            "-" if peak is None else f"{peak:.1f}",
            f"{comparison.step.total:.3f}",
        )
    print_uncut(table)
    for scopes in (("in",), ("in", "near")):
        title = f"errors of rows in scope {' and '.join(scopes)}"
        print_uncut(_families(title, family_errors(comparisons, scopes)))
    pairs = pair_errors(comparisons)
    for pair in pairs:
        print_uncut(
            f"ratio: {pair.predicted:.2f}, measured {pair.measured:.2f} ({pair.error:+.1%}): "
            f"{pair.name}"
        )
    ignoring: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for comparison in comparisons:
        ignoring[comparison.run.unused].append(comparison.run.row.name)
    for unused, names in ignoring.items():
        if unused:
            facts = ", ".join(map(_with_nearest, unused))
            print_uncut(f"not used: {facts} of {'; '.join(names)}")


def _with_nearest(key: str) -> str:
    nearest = get_close_matches(key, [*MeasuredRow.model_fields, *Beyond.model_fields], n=1)
    return f"{key} (did you mean {nearest[0]}?)" if nearest else key


def _families(title: str, families: dict[str, FamilyErrors]) -> Table:
    names = ("rows", "median", "largest", "too fast", "eight in ten took, of the estimate")
    table = titled_table(title, "family", *names, words=1)
    for family, errors in families.items():
        table.add_row(
            family,
            str(errors.rows),
            f"{errors.median:.1%}",
            f"{errors.largest:.1%}",
            f"{errors.fast} of {errors.rows}",
            f"{errors.tenth:.2f} to {errors.nine_tenths:.2f}",
        )
    return table
