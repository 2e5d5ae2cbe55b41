"""Prints findings as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from moepp_megatron.tools.doctor.finding import Finding, Severity

_STYLES = {
    Severity.OK: "green",
    Severity.NOTE: "cyan",
    Severity.WARNING: "yellow",
    Severity.ERROR: "bold red",
}


def findings_table(findings: Sequence[Finding]) -> Table:
    """Check, finding and remedy, coloured by severity; the node where there are several."""
    several = len({finding.node for finding in findings if finding.node}) > 1
    table = Table(*(["node"] if several else []), "check", "", "finding", "what to do")
    for finding in findings:
        style = _STYLES[finding.severity]
        observation = finding.found + (f" ({finding.rule})" if finding.rule else "")
        # Text, not markup: a path may hold square brackets.
        cells = [finding.node] if several else []
        cells += [finding.check]
        table.add_row(
            *(Text(cell) for cell in cells),
            Text(finding.severity.name.lower(), style=style),
            Text(observation),
            Text(finding.remedy),
        )
    return table


def counts(findings: Sequence[Finding]) -> str:
    """One line: how many findings of each severity, and whether a run can start."""
    errors, warnings = (
        sum(finding.severity == severity for finding in findings)
        for severity in (Severity.ERROR, Severity.WARNING)
    )
    verdict = "not fit" if errors else "fit"
    return f"{verdict}: {len(findings)} findings, {errors} errors, {warnings} warnings"
