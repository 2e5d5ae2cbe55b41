"""`moepp slurm`: the batch script of a run on a Slurm cluster."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from moepp_megatron.cli.echo import echo, warn
from moepp_megatron.cli.options import ConfigArgument, OverridesArgument
from moepp_megatron.config import Config, ConfigError, check_config, load_config, with_overrides


def slurm(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    nodes: Annotated[
        int | None, Option(min=1, help="Ask for this many nodes; by default, slurm.nodes.")
    ] = None,
    submit: Annotated[
        bool, Option("--submit", help="Submit the job instead of printing its script.")
    ] = False,
) -> None:
    """Print, or submit, the Slurm job that trains the model of CONFIG.

    Examples:
        moepp slurm configs/models/moepp_7b_16_4.yaml data.path=data/mine --nodes 4
        moepp slurm configs/models/moepp_0.6b_8_4.yaml moe.tau=0.25 run.dir=runs/tau --submit
    """
    from moepp_megatron.cluster.slurm_script import SlurmJob

    settings = load_config(config, overrides or [])
    warn(*check_config(settings))
    if nodes is not None:
        settings = with_overrides(settings, [f"slurm.nodes={nodes}"])
    job = SlurmJob(settings, config, overrides or [], Path.cwd())
    _report_path_problems(settings, submit)
    if submit:
        echo(job.submit())
    else:
        typer.echo(job.script(), nl=False)


def _report_path_problems(config: Config, submit: bool) -> None:
    """Say what the job would miss here; a job that is submitted would fail hours later."""
    from moepp_megatron.cli.path_problems import path_problems

    problems, warnings = path_problems(config)
    # In a container paths can be others.
    if problems and submit and config.slurm.container == "none":
        raise ConfigError("\n".join(problems))
    warn(*problems, *warnings)
