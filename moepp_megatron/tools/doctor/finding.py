"""A finding of a check, findings as a table, and what is expected of a GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import IntEnum

from rich.table import Table
from rich.text import Text

from moepp_megatron.config.hardware import Hardware, Thresholds


class Severity(IntEnum):
    """Severity of a finding; only an error keeps a job from starting."""

    OK = 0
    NOTE = 1
    WARNING = 2
    ERROR = 3


_STYLES = {
    Severity.OK: "green",
    Severity.NOTE: "cyan",
    Severity.WARNING: "yellow",
    Severity.ERROR: "bold red",
}


@dataclass(frozen=True)
class Finding:
    """One result of one check, such as "ECC errors".

    `found` is the observation, with the subject's name and the number. `rule`, which must hold, is
    empty where nothing is broken, `remedy` where there is nothing to do, `node` on a single node.
    """

    check: str
    found: str
    rule: str = ""
    remedy: str = ""
    severity: Severity = Severity.OK
    node: str = ""

    def __post_init__(self) -> None:
        """Assert that a warning or error has a rule and a remedy."""
        if self.severity >= Severity.WARNING:
            assert self.rule, f"{self.check}: a {self.severity.name} needs a rule"
            assert self.remedy, f"{self.check}: a {self.severity.name} needs a remedy"

    def line(self) -> str:
        """The finding in one line, as printed on stderr: `NODE: CHECK: FOUND, RULE; REMEDY`."""
        where = f"{self.node}: " if self.node else ""
        text = f"{where}{self.check}: {self.found}"
        text += f" ({self.rule})" if self.rule else ""
        return " ".join((text + (f"; {self.remedy}" if self.remedy else "")).split())

    def on(self, node: str) -> Finding:
        """The same finding, marked as found on `node`."""
        return replace(self, node=node)

    def as_dict(self) -> dict[str, str]:
        """The finding as a dictionary for JSON; the severity is in lower case."""
        return asdict(self) | {"severity": self.severity.name.lower()}


note, warning, error = (
    functools.partial(Finding, severity=severity)
    for severity in (Severity.NOTE, Severity.WARNING, Severity.ERROR)
)


def judged(
    holds: bool, check: str, found: str, rule: str, remedy: str, severity: Severity
) -> Finding:
    """A finding that is OK where its rule holds, and of this severity where it does not."""
    return Finding(check, found, rule, remedy, severity) if not holds else Finding(check, found)


def worst(findings: Iterable[Finding]) -> Severity:
    """The highest severity; OK without findings."""
    return max((finding.severity for finding in findings), default=Severity.OK)


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


@dataclass(frozen=True)
class Judge:
    """Expectations of a GPU: its kind's rated numbers, None where not described, and limits.

    With `preflight` a job is about to start, which taken or slow GPUs must prevent. The processes
    `own_pids` belong to this examination.
    """

    hardware: Hardware
    preflight: bool = False
    own_pids: frozenset[int] = frozenset()

    @property
    def thresholds(self) -> Thresholds:
        """Limits of health of this kind of GPU."""
        return self.hardware.thresholds

    @property
    def unfit_now(self) -> Severity:
        """Severity of what spoils a run but not the machine."""
        return Severity.ERROR if self.preflight else Severity.WARNING
