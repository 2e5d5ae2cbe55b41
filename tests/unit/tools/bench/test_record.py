"""One file of all results of a card, and the arguments of the script that makes it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks import record
from moepp_megatron.config import UnfitError, load_config
from tests import ROOT
from tests.commands import captured
from tests.refusals import config_error

CARD = {
    "device": "NVIDIA H100 80GB HBM3",
    "kind": "cuda",
    "versions": {"torch": "2.15.0"},
    "matmul_tflops": {"bf16": 700.0},
}
TESTS = """<testsuites><testsuite tests="4">
<testcase classname="tests.gpu.test_layer" name="test_a"/>
<testcase classname="tests.gpu.test_layer" name="test_b"><failure message="no"/></testcase>
<testcase classname="tests.gpu.test_fp8" name="test_c"><skipped message="needs DeepEP"/></testcase>
<testcase classname="tests.gpu.test_fp8" name="test_d"><skipped message="needs DeepEP"/></testcase>
</testsuite></testsuites>
"""


@pytest.fixture
def folder(tmp_path):
    """Return the folder that the steps leave: the FP8 step failed, the layer was run twice."""
    contents = {
        "card.json": CARD,
        "layer_bf16.json": [{"shape": "0.6B", "efficiency": 0.96}],
        "step_bf16.json": {"speedup": 1.2},
        "step_fp8_delayed.json": {"speedup": 9.9},
    }
    run = tmp_path / "run_first"
    run.mkdir()
    lines = [{"step": step, "loss": 9.0, "step_time_s": 0.5} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    small = {"run.dir": "x", "parallel.expert_model_parallel_size": "1"}
    quickstart = load_config(
        ROOT / "configs/quickstart.yaml", [f"{name}={value}" for name, value in small.items()]
    )
    (run / "config.yaml").write_text(quickstart.to_yaml())
    (tmp_path / "run_first.log").write_text("...\noptional packages used: Triton 3.6.0; none\n")
    (tmp_path / "run_empty").mkdir()
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    rows = [{"made": "x"}, {"model": "vanilla", "batch": 1, "decode_of_vanilla": 1.0}]
    (tmp_path / "serve.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "tests.xml").write_text(TESTS)
    lines = ["tests\t1\t60\tabc", "card\t0\t3\tabc", "layer_bf16\t1\t2\tabc"]
    lines += ["step_bf16\t0\t9\tabc", "step_fp8_delayed\t1\t4\tabc", "layer_bf16\t0\t30\tdef"]
    (tmp_path / "steps.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_one_file_of_all_results(folder, monkeypatch):
    monkeypatch.setattr(record, "driver_version", lambda: "580.95.05")
    path = record.write_record(folder, folder / "results", "benchmarks/gpu.sh --steps card")
    assert path == folder / "results/nvidia_h100_80gb_hbm3.json"
    found = json.loads(path.read_text())
    assert (found["card"], found["driver"]) == ("NVIDIA H100 80GB HBM3", "580.95.05")
    assert found["command"] == "benchmarks/gpu.sh --steps card"
    assert found["commits"] == ["abc", "def"]
    assert found["versions"] == CARD["versions"]
    assert found["measured"] == CARD
    assert found["layer"] == {"bf16": [{"shape": "0.6B", "efficiency": 0.96}]}
    assert found["step"] == {"bf16": {"speedup": 1.2}}, "a step that failed has no numbers"
    assert found["serve"]["vanilla, batch 1"]["decode_of_vanilla"] == 1.0
    (run,) = found["runs"].values()
    assert (run["step"], run["memory_bytes"]) == (2, None)
    assert run["modules"] == "optional packages used: Triton 3.6.0; none"
    # The planner's: some GiB that CUDA takes, and a small model.
    assert 2**30 < run["estimated_bytes"] < 8 * 2**30
    assert found["tests"]["tests"] == {
        "passed": 1,
        "failed: tests.gpu.test_layer.test_b": 1,
        "skipped: needs DeepEP": 2,
    }
    assert [(step["name"], step["exit_status"]) for step in found["steps"]] == [
        ("tests", 1),
        ("card", 0),
        ("step_bf16", 0),
        ("step_fp8_delayed", 1),
        ("layer_bf16", 0),
    ]


def test_steps_that_were_cut_short_leave_the_others(folder):
    with (folder / "run_first/metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    (folder / "run_second").mkdir()
    (folder / "run_second/metrics.jsonl").write_text('{"step": 1, "lo')
    (folder / "tests.xml").write_text(TESTS[:100])
    found = record.assemble(folder, "a command")
    assert {name: run["step"] for name, run in found["runs"].items()} == {"first": 2}
    (reason,) = found["tests"]["tests"]
    assert reason.startswith("unreadable: ")


def test_records_of_two_machines_make_one(folder):
    """Of a machine that was lent twice, each time for other parts."""
    first = record.write_record(folder, folder / "first", "one")
    (folder / "layer_bf16.json").rename(folder / "layer_bf16_cutlass.json")
    (folder / "tests.xml").rename(folder / "kernels.xml")
    (folder / "steps.tsv").write_text("card\t0\t5\tghi\t\nlayer_bf16_cutlass\t0\t2\tghi\t7B .75\n")
    second = record.write_record(folder, folder / "second", "two")
    # The order of the command line does not count.
    command = [sys.executable, "-m", "benchmarks.record", str(second), str(first), "--out"]
    subprocess.run([*command, str(folder / "both")], cwd=ROOT, check=True, capture_output=True)
    found = json.loads((folder / "both" / first.name).read_text())
    assert set(found["layer"]) == {"bf16", "bf16_cutlass"}
    assert set(found["tests"]) == {"kernels", "tests"}
    assert found["commits"] == ["abc", "def", "ghi"]
    seconds = {step["name"]: step["seconds"] for step in found["steps"]}
    assert (seconds["card"], seconds["tests"], seconds["layer_bf16_cutlass"]) == (5, 60, 2)
    second.write_text(second.read_text().replace("H100", "H200"))
    with config_error("must be of one card, not of NVIDIA H100 .* and NVIDIA"):
        record.joined([first, second])


def test_no_card_no_record(folder):
    (folder / "card.json").unlink()
    with config_error(r"card.json must be what `benchmarks.card` writ"):
        record.assemble(folder, "a command")
    (folder / "card.json").write_text("{")
    with config_error(r"card.json must be JSON \(.*\); remove it"):
        record.assemble(folder, "a command")


def test_a_cpu_is_no_card(folder):
    (folder / "card.json").write_text(json.dumps(CARD | {"device": "cpu", "kind": "cpu"}))
    with pytest.raises(UnfitError, match="need a CUDA GPU; use --allow-cpu to try the script"):
        record.write_record(folder, folder, "a command")
    assert record.write_record(folder, folder, "a command", allow_cpu=True).name == "cpu.json"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--steps", "cards"], 2, "--steps (cards) must be of card, kernels, train, layer,"),
        (["--steps", "layer_bf17"], 2, "--steps (layer_bf17) must be of card, kernels,"),
        (["--cpu"], 2, "argument (--cpu) must be --steps, --shapes, --taus, --limit, --work,"),
        (
            ["--limit", "4m"],
            2,
            "--limit (4m) must be a number of seconds above 30; use --limit 240",
        ),
        (["--out"], 2, "--out must be followed by a value"),
        ([], 3, "needs a CUDA GPU; use --rehearse to try the script"),
    ],
)
def test_wrong_usage_of_the_script(arguments, status, message):
    if status == 3 and shutil.which("nvidia-smi"):
        pytest.skip("there is a card here")
    command = [str(ROOT / "benchmarks/gpu.sh"), *arguments]
    done = captured(command)
    assert done.returncode == status
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def part_of_the_script(*names, then, settings=""):
    """A program of functions of gpu.sh, with settings that the script has by then."""
    script = (ROOT / "benchmarks/gpu.sh").read_text()
    begins = [script.index(f"\n{name}() {{") for name in names]
    functions = [script[begin : script.index("\n}\n", begin)] + "\n}" for begin in begins]
    first = f"set -euo pipefail; work=$1 commit=abc again= failed=0 limit= choice= {settings}"
    return "\n".join([first, *functions, then])


def bash(program, folder, *more):
    return ["bash", "-c", program, "gpu.sh", str(folder), *more]


def started(program, folder):
    """As a terminal starts it: its errors can be read, and its group be interrupted."""
    command = bash(program, folder)
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_an_interrupt_ends_the_part_and_the_script(tmp_path):
    """As a terminal's Ctrl-C, which reaches the script's group and not what `timeout` runs."""
    program = part_of_the_script(
        *("die", "interrupted", "passed", "run"),
        then="trap interrupted INT; run part bash -c 'echo $$ >&2; exec sleep 100'; run next true",
    )
    script = started(program, tmp_path)
    part = int(script.stderr.readline())
    os.killpg(script.pid, signal.SIGINT)
    assert script.wait(20) == 130
    assert script.stderr.read() == "error: interrupted; the same command continues\n"
    assert not psutil.pid_exists(part)
    assert not (tmp_path / "steps.tsv").exists()


def test_an_interrupt_right_after_the_start_of_a_part_ends_it(tmp_path):
    program = part_of_the_script(
        "die", "interrupted", "passed", "run", then="trap interrupted INT; run part sleep 100"
    )
    waits = 'wait "$!"'
    assert waits in program
    program = program.replace(waits, f"kill -INT $$; {waits}")
    script = started(program, tmp_path)
    # Until everything that writes there has ended, the part too.
    _, errors = script.communicate(timeout=20)
    assert errors == "error: interrupted; the same command continues\n"
    assert script.returncode == 130


def test_a_part_that_has_passed_is_not_run_again(tmp_path):
    then = 'run part bash -c "echo ran; exit $4" | grep -c "^ran"; exit 0'
    settings = "commit=$2 again=$3 choice=$5"
    program = part_of_the_script("passed", "run", then=then, settings=settings)

    def ran(commit, again="", status=0, choice=""):
        return int(captured(bash(program, tmp_path, commit, again, str(status), choice)).stdout)

    assert ran("abc", status=1) == 1
    assert ran("abc") == 1, "it had failed"
    assert ran("abc") == 0
    assert ran("abc", again="1") == 1
    assert ran("def") == 1, "another commit"
    assert ran("abc-dirty") == 1
    assert ran("abc-dirty") == 1, "changes that have no name"
    assert ran("unknown") == 1
    assert ran("unknown") == 1, "no git to ask"
    assert ran("def") == 1
    assert ran("def", choice="7B 0.75") == 1, "another choice of shapes"
    steps = (tmp_path / "steps.tsv").read_text().splitlines()
    assert [line.split("\t")[1] for line in steps] == ["1", *["0"] * 9]


def test_parts_end_at_the_limit(tmp_path):
    """One is cut off, the next is not started, and there is time left for the record."""
    then = 'run quick echo done; run part sleep 60; run next sleep 60; echo "${left[*]}"'
    settings = "limit=8 spare=2 left=()"
    program = part_of_the_script("passed", "run", then=then, settings=settings)
    begin = time.monotonic()
    done = captured(bash(program, tmp_path))
    assert time.monotonic() - begin < 9
    assert done.stdout.splitlines()[-2:] == ["left out: --limit is reached", "next"]
    assert (tmp_path / "quick.log").read_text() == "done\n"
    steps = (tmp_path / "steps.tsv").read_text().splitlines()
    assert [line.split("\t")[:2] for line in steps] == [["quick", "0"], ["part", "124"]]
