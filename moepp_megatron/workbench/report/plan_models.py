"""The models of a plan compared: speed, and what a whole run takes."""

from __future__ import annotations

from rich.table import Table

from moepp_megatron.workbench.planning.measured.compare import Range
from moepp_megatron.workbench.planning.outlook import outlook_of
from moepp_megatron.workbench.planning.plan import Plan
from moepp_megatron.workbench.planning.planned import Planned
from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.terminal import titled_table


def models_table(plan: Plan, errors: Range | None) -> Table:
    """Speed of each model in its fastest layout, and against vanilla in the same one."""
    title = "MoE++ and vanilla, each in its fastest layout"
    names = ("phi", "step s", "range", "speed-up", "same layout", "tok/s/GPU", "a2a")
    table = titled_table(title, "model", *names, words=1)
    table.add_column("layout")
    shown = models(plan)
    base = next((planned for planned in shown if planned.kind == "vanilla"), shown[0])
    for planned in shown:
        vanilla_s, room = planned.vanilla_step_s, "" if planned.vanilla_fits else " (no room)"
        table.add_row(
            model_name(planned),
            f"{planned.ffn_share:.3f}",
            f"{planned.step.total:.3f}",
            _step_range(planned, errors),
            f"{base.step.total / planned.step.total:.2f}",
            "-" if vanilla_s is None else f"{vanilla_s / planned.step.total:.2f}{room}",
            f"{planned.tokens_per_s_per_gpu:,.0f}",
            size_words(planned.step.exchange_bytes),
            short_name(planned),
        )
    return table


def _step_range(planned: Planned, errors: Range | None) -> str:
    if errors is None:
        return "-"
    low, high = errors.of(planned.step.total)
    return f"{low:.3f} to {high:.3f}"


def model_name(planned: Planned) -> str:
    """The model in words."""
    name = "vanilla" if planned.tau is None else f"MoE++ tau {planned.tau:g}"
    return name if planned.fits else f"{name} (does not fit)"


def outlooks_table(plan: Plan, tokens: float, price: float | None, errors: Range | None) -> Table:
    """Days, energy and money of a whole run of each model."""
    title = f"a run of {formatting.big_count(tokens)} tokens, with checkpoints and failures"
    names = ["days", "of these lost", "range", "GPU hours", "MWh"]
    if price is not None:
        names += ["money", "of it lost", "range", "a million tokens"]
    table = titled_table(title, "model", *names, words=1)
    for planned in models(plan):
        outlook = outlook_of(planned, plan.world, plan.machine, tokens, price, errors)
        row = [
            f"{outlook.all_days:,.1f}",
            f"{outlook.lost_days:,.2f}",
            _range(outlook.low_days, outlook.high_days, ",.1f"),
            f"{outlook.gpu_hours:,.0f}",
            "-" if outlook.energy_mwh is None else f"{outlook.energy_mwh:,.4g}",
        ]
        if outlook.money is not None:
            row += [
                f"{outlook.money:,.0f}",
                f"{outlook.lost_money:,.0f}",
                _range(outlook.low_money, outlook.high_money, ",.0f"),
                f"{outlook.money_per_million:.4g}",
            ]
        table.add_row(model_name(planned), *row)
    return table


def _range(low: float | None, high: float | None, form: str) -> str:
    return "-" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def how_well(errors: Range | None) -> str:
    """How far such estimates were off."""
    if errors is None:
        return "estimates: docs/planning.md says how well they hold"
    found = errors.errors
    whose = f"{found.rows} published runs ({errors.family}) that set no number of the model"
    other = "" if errors.is_own else "; there are too few of this GPU"
    return (
        f"estimates, off by {found.median:.0%} in the median of {whose}{other}. Ranges hold eight "
        "in ten of them; MWh at the GPUs' rated power; failures as docs/planning.md assumes them"
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
