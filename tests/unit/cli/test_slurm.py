"""`moepp slurm`: what the script asks for, and that nothing in it is more than a value."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from moepp_megatron.cli.slurm import slurm
from moepp_megatron.cluster import slurm_script
from moepp_megatron.cluster.slurm_script import SlurmJob
from moepp_megatron.config import load_config, parse_config
from tests.parallel.training_runs import merged, settings
from tests.refusals import config_error, refusal
from tests.unit.data.letters import prepare_letters

CONTENT = settings(
    run={"dir": "runs/test"},
    model={"vocab_size": 257},
    training={"global_batch_size": 96, "micro_batch_size": 1},
)
NASTY = [
    "plain",
    "two words",
    "it's",
    '"',
    "$(touch pwned)",
    "`touch pwned`",
    "$HOME ${PATH} $0",
    "; touch pwned; #",
    "a\nb\n#SBATCH --nodes=99\ntouch pwned",
    "\\",
    "\\'; touch pwned",
    "{{ 7 * 7 }}{% raw %}",
    "* ? [a] ~ !x & | < > ( )",
    "\u00e9\u4e2d\U0001f600",
    "\r\t\x1b",
    "-n --nodes=99",
]


def config(**sections):
    return parse_config(merged(CONTENT, sections))


def job(*, file="/c.yaml", overrides=(), folder="/shared/code", **sections):
    return SlurmJob(config(**sections), Path(file), overrides, Path(folder))


def directives(script):
    """The `#SBATCH` options, split by a shell's rules; sbatch's own are tested in tests/slurm."""
    options = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH "):
            (option,) = shlex.split(line.removeprefix("#SBATCH "))
            name, _, value = option.removeprefix("--").partition("=")
            options[name] = value
    return options


@pytest.fixture
def bash(tmp_path, monkeypatch):
    """Runs a script in real bash, where a stand-in for common.sh prints what it was given."""

    def run(make, folder_name="repository"):
        root = tmp_path / folder_name
        (root / "slurm").mkdir(parents=True)
        (root / "slurm/common.sh").write_text(
            'show() { printf "%s\\0" "$1"; shift; printf "%s\\0" "$#" "$@"; }\n'
            'moepp_job() { show arguments "$@"; show image "$MOEPP_CONTAINER_IMAGE"\n'
            'show mounts "${MOEPP_CONTAINER_MOUNTS[@]}"\n'
            'show preflight "${MOEPP_PREFLIGHT[@]}"\n'
            'show again "$(printenv MOEPP_RESUME_COMMAND)"; }\n'
        )
        monkeypatch.setattr(slurm_script, "REPOSITORY", root)
        script = make().script()
        done = subprocess.run(
            [shutil.which("bash") or "bash"],
            input=script.encode(),
            env={"PATH": "/usr/bin:/bin", "HOME": "/expanded"},
            cwd=tmp_path,
            capture_output=True,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert not list(tmp_path.rglob("pwned"))
        words = done.stdout.decode().split("\0")[:-1]
        shown = {}
        while words:
            name, count, words = words[0], int(words[1]), words[2:]
            shown[name], words = words[:count], words[count:]
        return shown

    return run


@pytest.mark.parametrize("text", NASTY)
def test_bash_sees_every_value_unharmed(bash, text):
    overrides = [f"run.name={text}", text]
    shown = bash(
        lambda: job(
            file=f"/{text}/c.yaml",
            overrides=overrides,
            slurm={
                "container": "apptainer",
                "container_image": text,
                "container_mounts": [f"{text}:/x"],
                "preflight": True,
                "preflight_command": [text, text],
            },
        ),
        # No folder name holds a slash; every other character may be in the clone's path.
        folder_name=f"clone {text}",
    )
    (again,) = shown.pop("again")
    cd, folder, then, *words = shlex.split(again)
    assert (cd, folder, then) == ("cd", "/shared/code", "&&")
    assert words == ["moepp", "slurm", f"/{text}/c.yaml", *overrides, "--nodes", "1", "--submit"]
    assert shown == {
        "arguments": [f"/{text}/c.yaml", *overrides],
        "image": [text],
        "mounts": [f"{text}:/x"],
        "preflight": [text, text],
    }


def test_nothing_is_imported_from_the_folder_of_the_job():
    (line,) = (each for each in job().script().splitlines() if each.startswith("MOEPP_COMMAND="))
    assert " -P -m moepp_megatron.cli.main " in line


@pytest.mark.parametrize("text", [text for text in NASTY if text.isprintable()])
def test_sbatch_lines_hold_one_value(text):
    options = directives(job(run={"name": text}).script())
    assert options["job-name"] == text
    assert options["nodes"] == "1"


@pytest.mark.parametrize("text", [text for text in NASTY if not text.isprintable()])
def test_what_no_sbatch_line_can_hold_is_refused(text):
    line = refusal(job(run={"name": text}).script)
    assert "--job-name (" in line
    assert "must be printable text on one line" in line
    assert len(line.splitlines()) == 1


def test_the_job_that_is_asked_for():
    options = directives(
        job(
            run={"name": "x"},
            slurm={
                "nodes": 4,
                "time": "2-00:00:00",
                "partition": "gpu",
                "account": "team",
                "exclude": "n[1-2],n7",
                "options": ["--reservation=big one", "--verbose"],
            },
        ).script()
    )
    assert options == {
        "job-name": "x",
        "chdir": "/shared/code",
        "output": "/shared/code/runs/test/slurm/%j.out",
        "open-mode": "append",
        "nodes": "4",
        "ntasks-per-node": "1",
        "gpus-per-node": "8",
        "signal": "B:USR1@600",
        "time": "2-00:00:00",
        "partition": "gpu",
        "account": "team",
        "exclude": "n[1-2],n7",
        "requeue": "",
        "exclusive": "",
        "mem": "0",
        "reservation": "big one",
        "verbose": "",
    }


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("--array=0-3", "a job for each run"),
        ("--nodes=2", "slurm.nodes"),
        ("--ntasks=8", "slurm.gpus_per_node or slurm.cpu_ranks_per_node"),
        ("--signal=TERM@5", "slurm.signal_before_s"),
        ("--no-requeue", "slurm.max_requeues 0"),
        # sbatch takes the beginning of a name.
        ("--part=gpu", "slurm.partition"),
        ("--mem=8G", "slurm.exclusive false"),
        ("--exclusive=user", "slurm.exclusive false"),
    ],
)
def test_options_that_are_set_from_settings_are_refused(option, instead):
    assert refusal(job(slurm={"options": ["--reservation=x", option]}).script) == (
        f"slurm.options ('{option}') must not be an option that moepp slurm sets itself; "
        f"use {instead}"
    )
    shared = {"options": ["--mem=8G", "--exclusive=user"], "exclusive": False}
    options = directives(job(slurm=shared).script())
    assert (options["mem"], options["exclusive"]) == ("8G", "user")


@pytest.mark.parametrize(
    ("slurm", "expected"),
    [
        ({"nodes": 4}, "4"),
        ({"nodes": 4, "min_nodes": 3}, "3-4"),
        # 96 sequences do not divide over 5 * 8 ranks.
        ({"nodes": 6, "min_nodes": 4}, "4,6"),
    ],
)
def test_only_numbers_of_nodes_that_the_layout_fits(slurm, expected):
    assert directives(job(slurm=slurm).script())["nodes"] == expected


def test_layout_that_does_not_fit_the_nodes_is_refused():
    with config_error(r"must be divisible .* \(slurm: 5 nodes \* 8 ranks\)"):
        job(slurm={"nodes": 5}).script()
    with config_error(r"\(slurm: 1 nodes \* 1 ranks\)"):
        job(
            slurm={"nodes": 2, "min_nodes": 1, "gpus_per_node": 0},
            parallel={"expert_model_parallel_size": 2},
        ).script()


def test_output_path_is_no_pattern():
    output = directives(job(run={"dir": "100%j/x"}).script())["output"]
    assert output == "/shared/code/100%%j/x/slurm/%j.out"
    with config_error("must not hold a backslash"):
        job(run={"dir": "a\\b"}).script()


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A configuration in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(CONTENT))
    return path


def put_sbatch(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "sbatch").write_text(f"#!/bin/bash\n{text}\n")
    (folder / "sbatch").chmod(0o755)


def prepared(folder):
    return f"data.path={prepare_letters(folder, 'data', a='a')}"


def test_prints_by_default_and_submits_on_request(path, tmp_path, monkeypatch, capsys):
    put_sbatch(tmp_path / "bin", f"cat >{shlex.quote(str(tmp_path))}/given; echo job 7")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    data = prepared(tmp_path)
    slurm(path, [data], nodes=2)
    printed, told = capsys.readouterr()
    assert told == ""
    assert directives(printed)["nodes"] == "2"
    assert not (tmp_path / "given").exists()
    assert not (tmp_path / "runs").exists()
    slurm(path, [data], nodes=2, submit=True)
    assert capsys.readouterr().out == "job 7\n"
    assert (tmp_path / "given").read_text() == printed
    assert (tmp_path / "runs/test/slurm").is_dir(), "Slurm does not make it"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("data.path=nowhere", "data.path (nowhere) must be a prepared folder, looked at /"),
        ("run.dir=c.yaml/run", "run.dir (c.yaml/run) must be a folder that can be written"),
        ("checkpoint.load=nowhere", "checkpoint.load (nowhere) must be a checkpoint folder"),
        ("distillation.teacher=nowhere", "distillation.teacher (nowhere) must be"),
    ],
)
def test_a_path_that_the_job_would_miss_is_said_and_not_submitted(
    override, problem, path, tmp_path, capsys
):
    overrides = [prepared(tmp_path), override]
    before = sorted(tmp_path.rglob("*"))
    slurm(path, overrides, nodes=2)
    assert problem in capsys.readouterr().err
    with config_error(re.escape(problem)):
        slurm(path, overrides, nodes=2, submit=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_paths_of_an_image_are_not_refused(path, monkeypatch, capsys):
    monkeypatch.setattr(SlurmJob, "submit", lambda job: "job 7")
    image = ["slurm.container=apptainer", "slurm.container_image=image.sif", "data.path=/inside"]
    slurm(path, image, nodes=2, submit=True)
    out, err = capsys.readouterr()
    assert out == "job 7\n"
    assert "warning: data.path (/inside) must be a prepared folder" in err


def test_a_refused_job_leaves_no_folder(path, tmp_path, monkeypatch):
    put_sbatch(tmp_path / "bin", "echo 'sbatch: error: invalid partition' >&2; exit 1")
    before = sorted(tmp_path.rglob("*"))
    job = SlurmJob(load_config(path, ["slurm.nodes=2"]), path, [], tmp_path)
    for places, words in ((f"{tmp_path}/bin:/usr/bin:/bin", "invalid partition"), ("", "PATH")):
        monkeypatch.setenv("PATH", places)
        with config_error(words):
            job.submit()
        assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "runs/test").mkdir(parents=True)
    refusal(job.submit)
    assert [place.name for place in (tmp_path / "runs").rglob("*")] == ["test"]
