"""The `moepp` command. Each command lives in its own file; heavy imports wait until one runs."""

from __future__ import annotations

import sys

import typer

from moepp_megatron.cli import (
    bench,
    convert,
    data,
    doctor,
    generate,
    inspect,
    monitor,
    pilot,
    plan,
    profile,
    report,
    scale,
    score,
    slurm,
    train,
)
from moepp_megatron.cli.paths import check_paths
from moepp_megatron.config import ConfigError, UnfitError
from moepp_megatron.config.printable import printable

app = typer.Typer(
    name="moepp",
    help="Train MoE++ models (arXiv 2410.07348) with megatron-core.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(doctor.doctor)
app.add_typer(data.app, name="data")
app.command()(train.train)
app.command()(generate.generate)
app.command()(score.score)
app.command()(inspect.inspect)
app.add_typer(convert.app, name="convert")
app.command()(report.report)
app.command()(monitor.monitor)
app.command()(profile.profile)
app.add_typer(bench.app, name="bench")
app.command()(plan.plan)
app.command()(pilot.pilot)
app.command()(scale.scale)
app.command()(slurm.slurm)
check_paths(app)


def run() -> None:
    """Entry point. A user's error is one line on stderr a problem, and its exit code."""
    try:
        app()
    except (ConfigError, UnfitError) as error:
        # It may quote a file that comes from elsewhere.
        typer.echo(f"error: {printable(str(error))}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    run()
