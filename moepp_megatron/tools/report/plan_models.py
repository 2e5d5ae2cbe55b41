"""The models of a plan compared: speed, and days and money of a run."""

from __future__ import annotations

from rich.table import Table

from moepp_megatron.tools.planning.measured.compare import Range
from moepp_megatron.tools.planning.plan import Plan
from moepp_megatron.tools.planning.planned import Planned
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.terminal import titled_table


def models_table(plan: Plan, tokens: float, price: float | None, errors: Range | None) -> Table:
    """Speed of each model in its fastest layout and in vanilla's, and days and money of its run."""
    title = "MoE++ and vanilla, each in its fastest layout, and in vanilla's"
    run = f"days for {formatting.big_count(tokens)} tokens"
    names = ["phi", "step s", "range", "speed-up", "in vanilla's", "tok/s/GPU", "a2a", run]
    names += [] if price is None else ["money"]
    table = titled_table(title, "model", *names, words=1)
    table.add_column("layout")
    shown = models(plan)
    base = next((planned for planned in shown if planned.kind == "vanilla"), shown[0])
    for planned in shown:
        days, shared_s = planned.run_seconds(tokens) / 86400, planned.shared_step_s
        table.add_row(
            model_name(planned),
            f"{planned.ffn_share:.3f}",
            f"{planned.step.total:.3f}",
            _step_range(planned, errors),
            f"{base.step.total / planned.step.total:.2f}",
            "-" if shared_s is None else f"{base.step.total / shared_s:.2f}",
            f"{planned.tokens_per_s_per_gpu:,.0f}",
            size_words(planned.step.exchange_bytes),
            f"{days:,.1f}",
            *([] if price is None else [f"{24 * days * plan.world * price:,.0f}"]),
            ", ".join([short_name(planned), *extras(planned)]),
        )
    return table


def extras(planned: Planned) -> list[str]:
    """List a layout's choices besides degrees: recomputation, bf16 states and overlap."""
    grid = planned.grid
    found = [*grid.recompute, *(f"{state} bf16" for state in grid.states)]
    return found + (["a2a overlap"] if grid.expert_overlap else [])


def _step_range(planned: Planned, errors: Range | None) -> str:
    if errors is None:
        return "-"
    low, high = errors.of(planned.step.total)
    return f"{low:.3f} to {high:.3f}"


def model_name(planned: Planned) -> str:
    """The model in words."""
    name = "vanilla" if planned.tau is None else f"MoE++ tau {planned.tau:g}"
    return name if planned.fits else f"{name} (does not fit)"


def how_well(errors: Range | None) -> str:
    """Say how far estimates were off."""
    if errors is None:
        return "estimates: docs/planning.md says how well they hold"
    found = errors.errors
    whose = f"{found.rows} published runs ({errors.family}) that set no number of the model"
    other = "" if errors.is_own else "; there are too few of this GPU"
    return (
        f"estimates, off by {found.median:.0%} in the median of {whose}{other}. Ranges hold eight "
        "in ten of them; days are those of steps"
    )


def size_words(count: float) -> str:
    """Format bytes as GB or TB."""
    if count >= 10e12:
        return f"{count / 1e12:,.0f} TB"
    return f"{count / 1e9:,.0f} GB" if count else "0"


def models(plan: Plan) -> list[Planned]:
    """Each model in its fastest layout: vanilla first, then by tau."""
    fastest = [plan.fastest] if plan.fastest else []
    return sorted([*plan.baselines, *fastest], key=lambda m: (m.tau is not None, -(m.tau or 0)))


def short_name(planned: Planned) -> str:
    """A layout's degrees above 1, such as TP2 PP8 EP64 MBS1."""
    grid = planned.grid
    replicas = [f"DP{grid.dp}"] if grid.dp > 1 else []
    return " ".join([*grid.splits, *replicas, f"MBS{grid.micro_batch}"])
