"""The plan for a GPU that is lent for half an hour: its calls fit, and play here."""

import json
import os
import re
import shutil
import struct
import subprocess
import tarfile
import time
import zipfile

import pytest

from benchmarks import one_architecture
from moepp_megatron.config.load import load_config
from moepp_megatron.config.parameters import checkpoint_bytes
from tests import ROOT
from tests.commands import captured

CALLS = range(1, 4)
# Of 30 minutes, starting the machine takes 90 s, and each call some seconds of transfers.
SECONDS = 30 * 60 - 90 - 10 * len(CALLS)


def test_all_calls_fit_into_half_an_hour(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks/lent_gpu.sh", tmp_path / "benchmarks")
    stand_in = tmp_path / "benchmarks/gpu.sh"
    stand_in.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    limits = []
    for call in CALLS:
        script = [str(tmp_path / "benchmarks/lent_gpu.sh"), str(call), "--rehearse"]
        script += ["--work", str(tmp_path)]
        done = captured(script, check=True)
        words = done.stdout.splitlines()
        limits.append(int(words[words.index("--limit") + 1]))
        # The real one takes these arguments: it says so by what it lacks.
        words.remove("--rehearse")
        gpu = [str(ROOT / "benchmarks/gpu.sh"), *words]
        if not shutil.which("nvidia-smi"):
            assert subprocess.run(gpu, capture_output=True, check=False).returncode == 3
    assert sum(limits) <= SECONDS
    assert max(limits) < 540


def test_every_test_of_a_gpu_is_in_a_part():
    script = (ROOT / "benchmarks/gpu.sh").read_text()
    rest = re.search(r"^files=\((.*)\)$", script, re.MULTILINE)[1].split()
    for path in (ROOT / "tests/gpu").glob("test_*.py"):
        assert path.stem.removeprefix("test_") in rest or f"tests/gpu/{path.name}" in script


def rehearse(folder, *command):
    """The record of a rehearsal, with the most checkpoints and bytes that lay there at once."""
    name, *arguments = command
    out = str(folder / "out")
    # lent_gpu.sh reads $OUT; gpu.sh does not.
    arguments += ["--out", out] if name == "gpu.sh" else []
    process = subprocess.Popen(
        [str(ROOT / "benchmarks" / name), *arguments, "--work", str(folder)],
        env=os.environ | {"MOEPP_COMMIT": "abc", "OUT": out},
        stdout=subprocess.DEVNULL,
        cwd=folder,
    )
    checkpoints = peak = 0
    while process.poll() is None:
        checkpoints = max(checkpoints, len(list(folder.glob("run_*/checkpoints/step_*"))))
        # Files go while they are counted.
        used = captured(["du", "-sb", folder])
        peak = max(peak, int(used.stdout.split()[0]))
        time.sleep(0.2)
    record = json.loads((folder / "out/cpu.json").read_text())
    return record | {"checkpoints": checkpoints, "peak": peak}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_call_within_its_limit_and_disk(tmp_path):
    for call in map(str, CALLS):
        found = rehearse(tmp_path, "lent_gpu.sh", call, "--rehearse")
        # 8 GB each of the 0.6B model; one is being written when another is removed.
        assert found["checkpoints"] <= 2
        (packed,) = (tmp_path / "out").glob(f"call_{call}.tar.gz.*")
        with tarfile.open(packed) as archive:
            names = archive.getnames()
        assert "./steps.tsv" in names
        assert "./card.log" in names
    assert any(name.startswith("./run_trace/profile/") for name in names)
    rest = "layer_bf16_constants_30,layer_bf16_constants_62,pair"
    found = rehearse(tmp_path, "gpu.sh", "--rehearse", "--steps", rest)
    steps = {step["name"]: step["exit_status"] for step in found["steps"]}
    assert {"step_bf16", "step_7b", "layer_bf16_constants_62", "run_ep", "resume"} <= steps.keys()
    assert set(steps.values()) == {0}
    assert found["step"]["7b"]["moepp_j"] is None


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_part_at_full_width_and_its_disk(tmp_path):
    layers = "layer_bf16,layer_bf16_constants_30,layer_bf16_constants_62"
    parts = f"train,{layers},step_bf16,step_micro4,step_7b,resume,pair"
    found = rehearse(tmp_path, "gpu.sh", "--wide", "--steps", parts)
    assert {
        step["name"]: step["exit_status"] for step in found["steps"] if step["exit_status"]
    } == {}
    whole, two = (
        checkpoint_bytes(load_config(ROOT / "configs/models/moepp_0.6b_8_4.yaml", changes))
        for changes in ([], ["model.num_layers=2"])
    )
    # Beside checkpoints lie corpus, traces and records, whatever the model's size.
    print(f"peak {found['peak'] / 1e9:.2f} GB, of it 2 checkpoints of {two / 1e9:.2f} GB")
    assert found["checkpoints"] <= 2
    assert found["peak"] <= 2 * two + (rest := 1e9)
    assert 2 * whole + rest <= 64e9


def piece(sm, code):
    return struct.pack("<HHIQ", 2, 257, 64, len(code)) + bytes(12) + struct.pack("<I32x", sm) + code


def test_a_wheel_keeps_the_code_of_one_architecture(tmp_path):
    pieces = [piece(80, b"a" * 40), piece(90, b"b" * 24), piece(100, b"c" * 8)]
    container = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, sum(map(len, pieces))) + b"".join(pieces)
    library = b"host code" + container + container + b"more host code"
    with zipfile.ZipFile(tmp_path / "x-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("x/lib.so", library)
        wheel.writestr("x/__init__.py", "a = 1\n")
        wheel.writestr("x-1.dist-info/RECORD", "x/lib.so,sha256=old,1\n")
    new = tmp_path / "new.whl"
    assert one_architecture.write_wheel(tmp_path / "x-1-py3-none-any.whl", new, 90) == 48
    with zipfile.ZipFile(new) as wheel:
        zeros = library.replace(b"a" * 40, bytes(40)).replace(b"c" * 8, bytes(8))
        assert wheel.read("x/lib.so") == zeros
        record = wheel.read("x-1.dist-info/RECORD").decode().splitlines()
    assert [line.split(",")[0] for line in record] == [
        "x/lib.so",
        "x/__init__.py",
        "x-1.dist-info/RECORD",
    ]
    assert "old" not in record[0]
