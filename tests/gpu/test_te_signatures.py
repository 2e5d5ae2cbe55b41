"""Transformer Engine's own signatures against those that its stand-in has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.te_stand_in.signatures import actual, fits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("real_transformer_engine")]

ROOT = Path(__file__).parents[2]


def test_the_stand_in_has_its_signatures():
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests/te_stand_in'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "tests.te_stand_in.signatures"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    differences = {}
    for path, wanted in json.loads(done.stdout).items():
        try:
            found = actual(path)
        except (ImportError, AttributeError) as error:
            differences[path] = repr(error)
            continue
        if not fits(wanted, found):
            differences[path] = f"{wanted} is not {found}"
    assert not differences, "\n".join(f"{path}: {what}" for path, what in differences.items())
