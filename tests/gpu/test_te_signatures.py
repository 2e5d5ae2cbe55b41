"""Transformer Engine's own signatures against those that its stand-in has."""

import json
import os
import sys

import pytest

from tests import ROOT
from tests.commands import captured, succeeded
from tests.te_stand_in.signatures import actual, fits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("real_transformer_engine")]


def test_the_stand_in_has_its_signatures():
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests/te_stand_in'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "tests.te_stand_in.signatures"]
    done = succeeded(captured(command, cwd=ROOT, env=environment, timeout=120))
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
