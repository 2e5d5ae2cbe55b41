"""Every command where packages of the extra `all` are missing: one line, and never a traceback."""

from pathlib import Path

import pytest

from moepp_megatron.runtime.optional import OF_ALL, how_to_install
from tests.commands import forked
from tests.unit.cli.test_dry_run import MINIMAL

WITHOUT = Path(__file__).parents[2] / "without.py"
# What every command needs; the others are imported by those that use them.
ALWAYS = ("psutil", "pydantic", "typer", "yaml")
# Not numpy, which megatron-core needs, too.
SOMETIMES = sorted(OF_ALL.keys() - {*ALWAYS, "numpy"})
# Exit statuses: 3 where a command lacks one of these, 2 where it refuses what is asked before.
COMMANDS = {
    "doctor": 3,
    "train c.yaml --dry-run": 3,
    "generate no-run --prompt a": 3,
    "score no-run --text c.yaml": 3,
    "inspect no-run --text c.yaml": 3,
    "report no-run": 3,
    "monitor no-run --once": 3,
    "monitor no-run --prometheus 9400": 3,
    "profile no-run": 3,
    "plan c.yaml --gpus 2": 3,
    "pilot no.yaml --out p": 2,
    "scale no.yaml --out s": 2,
    "slurm c.yaml --nodes 1": 3,
    "config show c.yaml": 0,
    "config keys moe": 0,
    "config from-megatron c.yaml": 2,
    "data prepare c.yaml --out d": 3,
    "data show no-data": 3,
    "data verify no-data": 3,
    "convert hf-to-mcore no-model o": 3,
    "convert mcore-to-hf no-run o": 3,
    "convert upcycle no-model o": 3,
    "convert megatron-lm no-run o": 3,
    "convert to-megatron-lm no-run o": 3,
    "bench layer --shapes no": 2,
    "bench step no.yaml": 2,
}


def line(package):
    return f"error: {OF_ALL[package]} is not installed; {how_to_install('moepp_megatron[all]')}\n"


@pytest.mark.parametrize("package", ALWAYS)
def test_what_every_command_needs(package, tmp_path):
    done = forked([str(WITHOUT), package, "--version"], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", line(package))


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_needs(command, tmp_path):
    (tmp_path / "c.yaml").write_text(MINIMAL)
    done = forked([str(WITHOUT), ",".join(SOMETIMES), *command.split()], tmp_path)
    assert done.returncode == COMMANDS[command], done.stderr
    assert "Traceback" not in done.stderr
    assert (done.stderr in map(line, SOMETIMES)) == (done.returncode == 3)
