"""What a pilot prints."""

from __future__ import annotations

from typing import Any

import pytest

from moepp_megatron.workbench.experiments.pilot.report import print_pilot
from moepp_megatron.workbench.experiments.pilot.result import PilotResult


def printed(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    print_pilot(PilotResult.model_validate(found))
    return capsys.readouterr().out
