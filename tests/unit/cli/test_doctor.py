"""`moepp doctor` as a user calls it, on this machine and with findings of another."""

import json
from functools import partial

import pytest

from moepp_megatron.cli.ranks import option_words
from moepp_megatron.tools.doctor import examine
from moepp_megatron.tools.doctor.finding import Finding, error, warning

SICK = [
    Finding("torch", "fine"),
    warning("GPU processes", "GPU 0: [busy]", "rule", "end them"),
    error("ECC errors", "GPU 3: 1", "must be 0", "reset the GPU"),
]


@pytest.fixture
def doctor(moepp):
    return partial(moepp, "doctor")


@pytest.fixture
def findings(monkeypatch):
    found = list(SICK)
    monkeypatch.setattr(examine, "examine_machine", lambda request: found)
    return found


def test_an_error_is_exit_code_3(findings, doctor):
    code, out, _ = doctor()
    assert code == 3
    for text in ("ECC errors", "reset the GPU", "GPU 0: [busy]", "1 errors, 1 warnings"):
        assert text in out


def test_warnings_alone_are_exit_code_0(findings, doctor):
    findings.pop()
    assert doctor()[0] == doctor("--preflight")[0] == 0


def test_preflight_gives_its_reasons_on_stderr(findings, doctor):
    code, out, err = doctor("--preflight")
    assert code == 3
    assert err.splitlines() == [
        "warning: GPU processes: GPU 0: [busy] (rule); end them",
        "error: ECC errors: GPU 3: 1 (must be 0); reset the GPU",
    ]
    assert out == "not fit: 3 findings, 1 errors, 1 warnings\n"


def test_json_is_all_of_stdout(findings, doctor):
    code, out, _ = doctor("--json")
    assert code == 3
    assert json.loads(out)["findings"][2] == {
        "check": "ECC errors",
        "severity": "error",
        "found": "GPU 3: 1",
        "rule": "must be 0",
        "remedy": "reset the GPU",
        "node": "",
    }


@pytest.mark.parametrize("equals", [False, True])
def test_json_with_a_file_is_written(findings, doctor, tmp_path, equals):
    file = tmp_path / ("doctor.text" if equals else "doctor.json")
    code, out, _ = doctor(*([f"--json={file}"] if equals else ["--json", file]))
    assert code == 3
    assert len(json.loads(file.read_text())["findings"]) == 3
    assert "ECC errors" in out


@pytest.fixture
def seen(monkeypatch):
    """The requests of examinations that find nothing."""
    seen = []
    monkeypatch.setattr(examine, "examine_machine", lambda request: seen.append(request) or [])
    return seen


def test_what_follows_json_may_be_the_configuration(seen, doctor):
    _, out, _ = doctor("--json", "configs/quickstart.yaml", "moe.tau=0.5")
    assert seen[0].config.moe.tau == 0.5
    assert json.loads(out) == {"findings": []}


def test_the_request_reaches_the_examination(seen, doctor, monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    doctor("configs/quickstart.yaml", "moe.tau=0.5", "--hardware", "h200", "--preflight")
    doctor("--gpus", "2")
    assert seen[0].config.moe.tau == 0.5
    assert (seen[0].hardware, seen[0].preflight, seen[0].expected_gpus) == ("h200", True, 4)
    assert (seen[1].config, seen[1].expected_gpus) == (None, 2)


def test_a_wrong_configuration_is_refused_before_anything_is_examined(doctor):
    for arguments in (["missing.yaml"], ["--hardware", "h1000"]):
        assert doctor(*arguments)[0] == 2


def test_options_are_given_to_the_ranks_as_they_came():
    given = {"preflight": True, "chat": False, "gpus": 0, "out": None, "prompt": ["a b", "-c"]}
    words = ["--preflight", "--gpus=0", "--prompt=a b", "--prompt=-c", "--top-p=0.5"]
    assert option_words(**given, top_p=0.5) == words
