"""launch/env.sh against stand-in interpreters: which it takes, when it installs, how it recovers.

The stand-ins are bash scripts that answer env.sh's questions and log the installations.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

# Answers the probe with {answer} (nothing: does not fit), makes environments that are copies of
# itself, and logs each pip call to $CALLS. A pip call does $PIP_DOES first.
STAND_IN = """#!/bin/bash
echo "call: $*" >>"$CALLS.all"
case "$*" in
*"env.py probe"*)
    [[ -n "{answer}" ]] || exit 1
    echo "{answer} $0" ;;
*"import pip"*) [[ -e "$(dirname "$0")/pip-is-here" ]] ;;
"-P -m venv "*)
    mkdir -p "$4/bin"
    cp "$0" "$4/bin/python"
    echo "version = {answer}" >"$4/pyvenv.cfg"
    touch "$4/bin/pip-is-here" ;;
"-P -m pip install"*)
    echo "pip $*" >>"$CALLS"
    eval "${{PIP_DOES:-}}"
    printf '#!/bin/sh\\n' >"$(dirname "$0")/moepp"
    chmod +x "$(dirname "$0")/moepp" ;;
"-P -m pip wheel"*)
    echo "pip $*" >>"$CALLS"
    env >"$CALLS.wheel"
    [[ -z "${{WHEEL_FAILS:-}}" ]] ;;
*"import torch;"*) echo "${{TORCH_CUDA-13.2}}" ;;
*"import nvidia"*) echo /site/nvidia/cu13/include:/site/nvidia/nccl/include ;;
*"import torch, transformer_engine"*) [[ -z "${{TE_BROKEN:-}}" ]] && echo 2.20.2 ;;
*"env.py constraints"*) : >"$5" ;;
*) exit 9 ;;
esac
"""


# All that env.sh may call besides an interpreter.
TOOLS = ["bash", "cat", "chmod", "cp", "dirname", "env", "flock", "ls", "mkdir", "mv"]
TOOLS += ["readlink", "rm", "sha256sum", "sleep", "tail", "touch"]


class Machine:
    """A repository, a PATH of stand-ins and system tools, and the log of pip calls."""

    def __init__(self, folder):
        self.root = folder / "a clone with spaces"
        (self.root / "launch").mkdir(parents=True)
        versions = ("constraints.txt", "constraints-torch2.11.txt")
        for name in ("launch/env.sh", "launch/env.py", "launch/te.sh", "pyproject.toml", *versions):
            shutil.copy(ROOT / name, self.root / name)
        self.bin = folder / "bin"
        self.tools = folder / "tools"
        self.bin.mkdir()
        self.tools.mkdir()
        for tool in TOOLS:
            (self.tools / tool).symlink_to(shutil.which(tool) or "")
        self.calls = folder / "calls"
        self.environment = {
            "PATH": f"{self.bin}:{self.tools}",
            "HOME": str(folder),
            "CALLS": str(self.calls),
        }

    def add_python(self, name, answer):
        path = self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STAND_IN.format(answer=answer))
        path.chmod(0o755)
        return path

    def start(self, script=None, **environment):
        script = script or f'source "{self.root}/launch/env.sh"; echo "$MOEPP_BIN"'
        return subprocess.Popen(
            ["bash", "-c", f"set -euo pipefail; {script}"],
            env=self.environment | environment,
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def source(self, script=None, **environment):
        process = self.start(script, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    @property
    def installs(self):
        return self.calls.read_text().count("pip -P -m pip install") if self.calls.exists() else 0

    @property
    def python_calls(self):
        log = Path(f"{self.calls}.all")
        return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def bare(tmp_path):
    return Machine(tmp_path)


@pytest.fixture
def machine(bare):
    """With an interpreter that fits."""
    bare.add_python("python3.12", "3.12")
    return bare


def test_installs_once_and_then_starts_no_python(machine):
    status, out, err = machine.source()
    assert (status, out.strip()) == (0, f"{machine.root}/.venv/bin"), err
    assert machine.installs == 1
    assert "-c " + str(machine.root / "constraints.txt") in machine.calls.read_text()
    activate = f"{machine.root}/.venv/bin/activate".replace(" ", "\\ ")
    last = f"set-up: ready; for this shell: source {activate}, then moepp --help\n"
    assert err.endswith(last)
    python_calls = machine.python_calls
    assert machine.source() == (0, out, "")
    # As a command it says how to call moepp, each time.
    assert machine.source(f'"{machine.root}/launch/env.sh"') == (0, "", last)
    assert machine.python_calls == python_calls


def test_another_tested_pair_has_its_own_versions_and_environment(machine):
    status, out, err = machine.source(MOEPP_PAIR="torch2.11")
    assert (status, out.strip()) == (0, f"{machine.root}/.venv-torch2.11/bin"), err
    assert "-c " + str(machine.root / "constraints-torch2.11.txt") in machine.calls.read_text()
    assert machine.source(MOEPP_PAIR="torch2.11") == (0, out, "")
    assert machine.source()[1].strip() == f"{machine.root}/.venv/bin"
    assert machine.installs == 2


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", ".venv/pyvenv.cfg"])
def test_installs_again_when_what_it_depends_on_changes(machine, name):
    machine.source()
    with (machine.root / name).open("a") as file:
        file.write("# changed\n")
    assert machine.source()[0] == 0
    assert machine.installs == 2


def test_failed_installation_says_why_and_is_tried_again(machine):
    status, _, err = machine.source(PIP_DOES="echo no route to the registry; exit 1")
    assert status == 1
    assert "the installation failed" in err
    assert "no route to the registry" in err
    assert machine.source()[0] == 0
    assert machine.installs == 2


@pytest.mark.faults
def test_killed_installation_is_finished_by_the_next_call(machine):
    # Kills the shell that waits for the installer, as a job limit would.
    status, _, _ = machine.source(PIP_DOES='kill -9 "$PPID"; exit 1')
    assert status != 0
    assert machine.source()[0] == 0
    assert machine.installs == 2


def test_two_callers_at_once_install_once(machine):
    callers = [machine.start(PIP_DOES="sleep 1") for _ in range(3)]
    errors = [caller.communicate(timeout=60)[1] for caller in callers]
    assert [caller.returncode for caller in callers] == [0, 0, 0], errors
    assert machine.installs == 1


def made_with(machine):
    status, _, err = machine.source()
    assert status == 0, err
    return err.split("(", 1)[1].split(")", 1)[0]


@pytest.mark.parametrize(
    "pythons",
    [
        [("python3", ""), ("python3.13", "3.13")],
        [("python3.12", ""), ("../second/python3.12", "3.12")],
        [("python3.12", "3.12-novenv"), ("python3.13", "3.13")],
    ],
    ids=["too old", "a shim that fails", "without venv"],
)
def test_an_interpreter_that_does_not_fit_hides_no_later_one(bare, pythons):
    *_, fits = [bare.add_python(*each).resolve() for each in pythons]
    bare.environment["PATH"] += f":{fits.parent}"
    assert made_with(bare) == str(fits)


# Options, variables, and how the line that refuses them begins.
REFUSED = {
    "no venv": ("", {"MOEPP_PYTHON": "../x/python3.13"}, 1, "apt-get install python3.13-venv"),
    "too old": (
        "",
        {"MOEPP_PYTHON": "python3.9"},
        1,
        "MOEPP_PYTHON (python3.9) must be CPython 3.12",
    ),
    "pair": ("", {"MOEPP_PAIR": "torch9"}, 1, "set it to torch2.11"),
    "kind": ("", {"MOEPP_ENV": "other"}, 1, "MOEPP_ENV (other) must be current"),
    "precious": ("", {"MOEPP_VENV": "."}, 1, "must be an environment with bin/python"),
    "no folder": ("--offline", {}, 2, "needs a folder"),
    "no wheels": ("--offline launch", {}, 2, "MOEPP_OFFLINE (launch) must be a folder that holds"),
    "word": ("--tee", {}, 2, "--te"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_before_anything_is_made(machine, name):
    options, environment, status, says = REFUSED[name]
    machine.add_python("../x/python3.13", "3.13-novenv")
    machine.add_python("python3.9", "")
    before = sorted(machine.root.iterdir())
    script = f'cd "{machine.root}" && launch/env.sh {options}'
    ended, _, err = machine.source(script, **environment)
    assert (ended, says in err) == (status, True), err
    assert machine.installs == 0
    assert (
        name == "no venv"
        or [p for p in sorted(machine.root.iterdir()) if p.suffix != ".lock"] == before
    )


def test_reused_environment_keeps_its_versions(bare, tmp_path):
    bare.add_python("../other/bin/python", "3.12")
    other = tmp_path / "other"
    status, out, err = bare.source(MOEPP_VENV=str(other))
    assert (status, out.strip()) == (0, f"{other}/bin"), err
    # Not the full constraints, and its own interpreter: nothing is made anew.
    assert "moepp-install.log.constraints" in bare.calls.read_text()
    assert not (bare.root / ".venv").exists()
    assert bare.source(MOEPP_VENV=str(other))[2] == ""


def test_tools_of_tests_come_with_the_first_script_that_needs_them(machine):
    assert machine.source()[0] == 0
    assert machine.calls.read_text().endswith("-e .[all]\n")
    dev = {"MOEPP_DEV": "1"}
    status, _, err = machine.source(**dev)
    assert status == 0, err
    assert machine.calls.read_text().endswith("-e .[dev]\n")
    assert "installing .[dev]" in err
    # Both are there, whoever asks next.
    assert machine.source(**dev)[2] == machine.source()[2] == ""
    assert machine.installs == 2


def te(machine, **environment):
    status, _, err = machine.source(f'"{machine.root}/launch/env.sh" --te', **environment)
    return status, err


def test_transformer_engine_is_compiled_against_the_torch_that_is_there(machine):
    status, err = te(machine)
    assert status == 0, err
    assert "Transformer Engine 2.20.2 imported" in err
    _, core, wheel, last = machine.calls.read_text().splitlines()
    wheels = f"{machine.root}/.wheels"
    assert core.endswith(
        "transformer_engine_cu13==2.20.2 nvidia-cuda-crt==13.2.* nvidia-cuda-cccl nvidia-curand"
    )
    # What was compiled once is found again.
    assert f"-f {wheels} --no-build-isolation --no-deps --wheel-dir {wheels}" in wheel
    compiled_with = Path(f"{machine.calls}.wheel").read_text().splitlines()
    assert "CPLUS_INCLUDE_PATH=/site/nvidia/cu13/include:/site/nvidia/nccl/include" in compiled_with
    assert "NVTE_BUILD_USE_NVIDIA_WHEELS=1" in compiled_with
    assert f"-f {wheels} -c {machine.root}/constraints.txt" in last
    assert last.endswith("transformer_engine[pytorch,core_cu13]==2.20.2")
    assert te(machine)[1].startswith("set-up: ready; for this shell: source ")
    assert machine.source()[0] == 0
    assert len(machine.calls.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"TORCH_CUDA": ""}, "this one is for CPUs"),
        ({"WHEEL_FAILS": "1"}, "the installation failed"),
        ({"TE_BROKEN": "1"}, "is installed and cannot be imported"),
    ],
)
def test_transformer_engine_that_fails_is_tried_again(machine, environment, says):
    status, err = te(machine, **environment)
    assert status == 1
    assert says in err
    # All the rest is there, and is not installed a second time.
    assert machine.source() == (0, f"{machine.root}/.venv/bin\n", "")
    before = machine.calls.read_text().count("-e .")
    assert te(machine)[0] == 0
    assert machine.calls.read_text().count("-e .") == before == 1


def test_offline_asks_no_registry(machine, tmp_path):
    wheels = tmp_path / "wheels of the node"
    wheels.mkdir()
    (wheels / "torch-2.12-cp312-cp312-linux_x86_64.whl").touch()
    status, _, err = machine.source(f'"{machine.root}/launch/env.sh" --offline "{wheels}"')
    assert status == 0, err
    assert f"--no-index -f {wheels} -c" in machine.calls.read_text()
    # A script that needs more than that was not told of the folder, and has no network either.
    status, _, err = machine.source(MOEPP_DEV="1")
    assert status == 0, err
    assert f"from the wheels in {wheels}, asking no registry" in err
    # Somebody else may say otherwise, and a folder that is gone is none.
    (machine.root / ".venv/.moepp-dev").unlink()
    assert machine.source(MOEPP_DEV="1", MOEPP_OFFLINE="")[0] == 0
    (machine.root / ".venv/.moepp-dev").unlink()
    wheels.rename(tmp_path / "elsewhere")
    assert machine.source(MOEPP_DEV="1")[0] == 0
    calls = machine.calls.read_text().splitlines()
    assert ["--no-index" in call for call in calls] == [True, True, False, False]


def test_the_current_environment_is_looked_at_and_left_alone(bare, tmp_path):
    current = {"MOEPP_ENV": "current", "MOEPP_PYTHON": sys.executable}
    project = bare.root / "pyproject.toml"
    project.write_text(
        '[project]\ndependencies = ["torch>=2.11.0a0", "numpy>=999", "x1y"]\n'
        '[project.optional-dependencies]\nall = []\ndev = ["pytest>=999", "x2y"]'
    )
    status, _, err = bare.source(**current)
    assert status == 1
    tested = bare.source(**current, MOEPP_DEV="1")[2]
    assert "pytest>=999: 9" in tested
    assert "x2y" not in tested
    assert "pytest" not in err
    lacks = [line.split("lacks ")[1] for line in err.splitlines()]
    assert lacks[0].startswith("numpy>=999: ")
    assert lacks[1] == "x1y: not installed"
    assert [line.split(":")[0] for line in lacks[2:]] in ([], ["moepp-megatron"])
    assert not (bare.root / ".venv").exists()
    # Packages that lie next to the interpreter's own.
    (tmp_path / "site/x1y-1.0.dist-info").mkdir(parents=True)
    (tmp_path / "site/x1y-1.0.dist-info/METADATA").write_text("Name: x1y\nVersion: 1.0\n")
    assert "x1y" not in bare.source(**current, PYTHONPATH=str(tmp_path / "site"))[2]


def test_scripts_work_through_a_symlink_from_another_folder(machine, tmp_path):
    for name in ("test.sh", "quickstart.sh"):
        shutil.copy(ROOT / "launch" / name, machine.root / "launch" / name)
    link = tmp_path / "run-tests"
    link.symlink_to(machine.root / "launch/test.sh")
    # The stand-in answers `-m pytest` with its status for unknown calls, which must come through.
    status, _, err = machine.source(f'"{link}" --collect-only')
    assert status == 9, err
    assert "-m pytest" in Path(f"{machine.calls}.all").read_text()
