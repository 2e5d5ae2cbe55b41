"""`moepp doctor`: what this node has, what it falls back to, what is unfit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moepp_megatron.cli.echo import echo
from moepp_megatron.cli.options import OverridesArgument
from moepp_megatron.cli.ranks import start_ranks
from moepp_megatron.config import Config, UnfitError, load_config

if TYPE_CHECKING:
    from moepp_megatron.workbench.doctor.finding import Finding


def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="Run whose needs and folders count.", metavar="CONFIG")
    ] = None,
    overrides: OverridesArgument = None,
    preflight: Annotated[
        bool,
        typer.Option(
            "--preflight",
            help="A job is about to start here: print only what is wrong, on stderr, and take "
            "busy or slow GPUs for errors.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Also write the JSON to this file.", metavar="FILE.json")
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="GPU to judge by: a name in configs/hardware or a YAML file; by default the "
            "GPU that is here.",
            metavar="NAME",
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=0, help="GPUs that must be here; by default as many as Slurm gave."),
    ] = None,
    nproc: Annotated[
        int,
        typer.Option(
            min=1, help="Ranks to start on this machine: adds collectives and the slowest rank."
        ),
    ] = 1,
) -> None:
    """Examine this machine. Exit code 3: something keeps a run from working here."""
    from moepp_megatron.config.hardware import load_hardware
    from moepp_megatron.runtime.quiet import quiet
    from moepp_megatron.runtime.rank import RankEnvironment

    settings = None if config is None else load_config(config, overrides or [])
    if hardware is not None:
        load_hardware(hardware)
    rank = RankEnvironment.read()
    if nproc > 1 and not rank.is_launched:
        _start_ranks(nproc, config, overrides or [], preflight, as_json, out, hardware, gpus)
        return
    quiet()
    findings = _examine(settings, preflight, hardware, gpus, rank)
    if findings is None:
        return
    _show(findings, preflight, as_json, out)
    _leave(findings)


def _examine(
    settings: Config | None,
    preflight: bool,
    hardware: str | None,
    gpus: int | None,
    rank: object,
) -> list[Finding] | None:
    from moepp_megatron.runtime.rank import RankEnvironment
    from moepp_megatron.workbench.doctor.examine import Request, expected_gpus
    from moepp_megatron.workbench.doctor.session import examine_machine, examine_ranks

    assert isinstance(rank, RankEnvironment), "read above"
    expected = gpus if gpus is not None else expected_gpus()
    request = Request(settings, hardware, preflight, expected)
    return examine_ranks(request, rank) if rank.is_launched else examine_machine(request)


def _show(findings: list[Finding], preflight: bool, as_json: bool, out: Path | None) -> None:
    from moepp_megatron.workbench.doctor.finding import Severity
    from moepp_megatron.workbench.doctor.table import counts, findings_table

    text = json.dumps({"findings": [finding.as_dict() for finding in findings]}, indent=2)
    if out is not None:
        from moepp_megatron.runtime.atomic import write_atomic

        try:
            write_atomic(out, (text + "\n").encode("ascii"))
        except OSError as error:
            raise UnfitError(
                f"--out ({out}) must be writable ({error.strerror}); name another file"
            ) from None
    if preflight:
        for finding in findings:
            if finding.severity >= Severity.WARNING:
                echo(f"{finding.severity.name.lower()}: {finding.line()}", err=True)
    if as_json:
        echo(text)
    elif preflight:
        echo(counts(findings))
    else:
        from moepp_megatron.runtime.terminal import Console

        # A log has no width; rich would take 80 columns, too narrow for three of text.
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(findings_table(findings))
        console.print(counts(findings))


def _leave(findings: list[Finding]) -> None:
    from moepp_megatron.runtime.launch import leave
    from moepp_megatron.workbench.doctor.finding import Severity, worst

    if worst(findings) >= Severity.ERROR:
        leave(UnfitError.exit_code)


def _start_ranks(
    nproc: int,
    config: Path | None,
    overrides: list[str],
    preflight: bool,
    as_json: bool,
    out: Path | None,
    hardware: str | None,
    gpus: int | None,
) -> None:
    arguments = ["doctor", *(["--preflight"] if preflight else [])]
    arguments += ["--json"] if as_json else []
    arguments += ["--out", str(out)] if out is not None else []
    arguments += ["--hardware", hardware] if hardware is not None else []
    arguments += ["--gpus", str(gpus)] if gpus is not None else []
    if config is not None:
        arguments += ["--", str(config), *overrides]
    start_ranks(nproc, arguments)
