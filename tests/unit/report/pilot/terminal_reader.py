"""What a pilot prints."""

from __future__ import annotations

from typing import Any

import pytest

from moepp_megatron.planning.pilot.result import PilotResult
from moepp_megatron.report.pilot import print_pilot


def printed(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    print_pilot(PilotResult.model_validate(found))
    return capsys.readouterr().out
