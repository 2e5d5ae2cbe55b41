"""`moepp doctor`: what this node has, what it falls back to, what is unfit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option
from typer.core import TyperCommand

from moepp_megatron.cli.echo import echo
from moepp_megatron.cli.options import GPU_NAMES, OverridesArgument
from moepp_megatron.cli.ranks import option_words, start_ranks
from moepp_megatron.config import UnfitError, load_config

if TYPE_CHECKING:
    from moepp_megatron.tools.doctor.finding import Finding


class Doctor(TyperCommand):
    """The command, which takes `--json` without a FILE too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Have `--json` without a value mean `--json -`: what comes after it may be CONFIG."""
        words = list(args)
        for place, word in enumerate(words):
            following = words[place + 1 : place + 2]
            if word == "--json" and not any(w == "-" or w.endswith(".json") for w in following):
                words[place] = "--json=-"
        return super().parse_args(ctx, words)


def doctor(
    config: Annotated[
        Path | None,
        Argument(
            help="Check what this YAML configuration needs, including its folders.",
            metavar="CONFIG",
        ),
    ] = None,
    overrides: OverridesArgument = None,
    preflight: Annotated[
        bool,
        Option(
            "--preflight",
            help="Print only what is wrong, on stderr, and take busy or slow GPUs for errors. This "
            "is for a job that is about to start.",
        ),
    ] = False,
    json_file: Annotated[
        Path | None,
        Option(
            "--json",
            help="Write the results as JSON to this file, whose name ends with .json; - or no FILE "
            "prints the JSON and nothing else.",
            metavar="[FILE.json]",
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        Option(
            help=f"Judge by this GPU: {GPU_NAMES}. By default, it is the GPU that is here.",
            metavar="NAME",
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        Option(min=0, help="Require this many GPUs; by default, as many as Slurm gave."),
    ] = None,
    nproc: Annotated[
        int,
        Option(
            min=1,
            help="Start this many ranks on this machine, which adds collectives and the slowest "
            "rank.",
        ),
    ] = 1,
) -> None:
    """Examine this machine.

    The exit status is 3 if something keeps a run from working here.

    Examples:
        moepp doctor
        moepp doctor configs/quickstart.yaml --nproc 2 --json doctor.json
    """
    from moepp_megatron.config.hardware import load_hardware
    from moepp_megatron.runtime.optional import quiet
    from moepp_megatron.runtime.rank import RankEnvironment

    settings = None if config is None else load_config(config, overrides or [])
    if hardware is not None:
        load_hardware(hardware)
    rank = RankEnvironment.read()
    if nproc > 1 and not rank.is_launched:
        options = option_words(preflight=preflight, json=json_file, hardware=hardware, gpus=gpus)
        arguments = [] if config is None else ["--", str(config), *(overrides or [])]
        start_ranks(nproc, ["doctor", *options, *arguments])
        return
    quiet()
    from moepp_megatron.tools.doctor.examine import (
        Request,
        examine_machine,
        examine_ranks,
        expected_gpus,
    )

    request = Request(settings, hardware, preflight, expected_gpus() if gpus is None else gpus)
    findings = examine_ranks(request, rank) if rank.is_launched else examine_machine(request)
    if findings is None:
        return
    _show(findings, preflight, json_file)
    _leave(findings)


def _show(findings: list[Finding], preflight: bool, json_file: Path | None) -> None:
    from moepp_megatron.runtime.atomic import write_json
    from moepp_megatron.runtime.terminal import Console
    from moepp_megatron.tools.doctor.finding import Severity, counts, findings_table

    if json_file is not None:
        write_json(json_file, {"findings": [finding.as_dict() for finding in findings]})
    if preflight:
        for finding in findings:
            if finding.severity >= Severity.WARNING:
                echo(f"{finding.severity.name.lower()}: {finding.line()}", err=True)
        echo(counts(findings))
        return
    # A log has no width; rich would take 80 columns, too narrow for three of text.
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(findings_table(findings))
    console.print(counts(findings))


def _leave(findings: list[Finding]) -> None:
    from moepp_megatron.runtime.launch import leave
    from moepp_megatron.tools.doctor.finding import Severity, worst

    if worst(findings) >= Severity.ERROR:
        leave(UnfitError.exit_code)
