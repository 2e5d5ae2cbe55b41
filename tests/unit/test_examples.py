"""examples/: the notebook runs, the page lists every file, and the new kind of expert works."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests import ROOT
from tests.commands import captured
from tests.unit.tools.report.conftest import synthetic_config, synthetic_records, write_run

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "read_metrics.ipynb"


def code_cells():
    notebook = json.loads(NOTEBOOK.read_text(encoding="ascii"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    # Numbers and pictures of one machine are no part of the example.
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    return ["".join(cell["source"]) for cell in code]


def test_the_notebook_reads_a_run(tmp_path, monkeypatch, capsys):
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    config = synthetic_config()
    records = synthetic_records(config, 12)
    records[4]["loss"] = None
    # Steps 3 to 12 were repeated after a restart, and a 13th is being written.
    run = write_run(tmp_path / "runs/quickstart", config, records + records[2:])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path / "examples")
    names = {}
    for number, source in enumerate(code_cells()):
        exec(compile(source, f"cell {number}", "exec"), names)
    drawn = [plt.figure(number) for number in plt.get_fignums()]
    plt.close("all")
    assert len(drawn) == 2
    assert len(drawn[0].axes[0].lines[0].get_xdata()) == 11
    assert len(drawn[1].axes) == 3
    assert "12 records, the last of step 12" in capsys.readouterr().out


@pytest.fixture
def patched(tmp_path):
    """A copy of the sources with the new kind of expert."""
    unneeded = shutil.ignore_patterns("__pycache__", "golden", "slurm", "fake_gpu", "te_stand_in")
    for name in ("moepp_megatron", "tests", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=unneeded)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    # One line around each change: work nearby does not make the example useless.
    patch = [str(EXAMPLES / "new_expert_kind.patch")]
    command = ["git", "apply", "-C1", f"--directory={tmp_path.name}", *patch]
    subprocess.run(command, cwd=tmp_path.parent, check=True, timeout=60)
    return tmp_path


def test_the_new_kind_of_expert_is_the_reference(patched):
    assert "num_scale_experts" in (patched / "moepp_megatron/experts.py").read_text()
    process = captured(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        + ["tests/unit/moe/test_scale_experts.py"],
        cwd=patched,
        env=os.environ | {"PYTHONPATH": str(patched), "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert process.returncode == 0, process.stdout[-4000:]
    assert "6 passed" in process.stdout
