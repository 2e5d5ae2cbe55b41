"""Alerts of a run: the record of one alert, and reading `RUN/alerts.jsonl`."""

import time
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moepp_megatron.catalogue import Number
from moepp_megatron.config.regular_file import check_regular
from moepp_megatron.observe.metrics import LONGEST_LINE

Severity = Literal["info", "warning", "critical"]


class Alert(BaseModel):
    """One alert (one line of `RUN/alerts.jsonl`).

    Attributes:
        time: Seconds since 1970 (UTC).
        rule: Name of the rule that raised it, such as `router_fault`.
        value: Of the metric; NaN is written as null.
        condition: Condition of the rule, such as `< 0.2 for 50 steps`.
        action: The action taken, such as `warn` or `put_back of step 150`.
        layer: Number of the transformer layer from 1, for a metric of one layer.
        cause: What a shift is due to: `data`, `router` or `unknown`; else None like the next two.
        since: First step of the evidence.
        moved: What has moved most, a text each.
        remedy: What to do, with the place in the documentation.
    """

    model_config = ConfigDict(extra="allow", frozen=True, ser_json_inf_nan="null")

    step: int
    time: Number = Field(default_factory=time.time)
    rule: str
    metric: str
    value: Number
    condition: str
    severity: Severity
    action: str
    layer: int | None = None
    cause: str | None = None
    since: int | None = None
    moved: list[str] | None = None
    remedy: str | None = None

    @classmethod
    def parse(cls, line: bytes) -> "Alert | None":
        """The alert of one line; None if the line is not an alert."""
        try:
            return cls.model_validate_json(line)
        except ValidationError:
            return None

    def to_json_line(self) -> str:
        """One line of JSON with its line end."""
        # None is left out, but a value that is not finite must stay: as null, as in metrics.jsonl.
        return self.model_dump_json(exclude_none=True) + "\n"

    def text(self) -> str:
        """The alert as one line of text."""
        where = "" if self.layer is None else f" of layer {self.layer}"
        text = (
            f"{self.severity} at step {self.step}: {self.rule}: {self.metric}{where} is "
            f"{self.value:.4g} ({self.condition}); action: {self.action}"
        )
        return text if self.remedy is None else f"{text}; {self.remedy}"


def read_alerts(path: Path) -> list[Alert]:
    """Return a run's alerts in the order of time; none where there is no file.

    Lines that are not alerts are left out: they are from a newer version, or unfinished. Raises
    OSError if the file cannot be read.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            lines = iter(partial(file.readline, LONGEST_LINE), b"")
            return list(filter(None, map(Alert.parse, lines)))
    except FileNotFoundError:
        return []
