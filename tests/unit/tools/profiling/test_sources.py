"""Formats are told apart by content, and what is none of them is said clearly."""

import gzip
import shutil
from pathlib import Path

import pytest

from moepp_megatron.tools.profiling.formats.sources import Format, read_recording, recognise
from moepp_megatron.tools.profiling.trace import ProfileError

SAMPLES = Path(__file__).parent / "samples"
FOLDERS = {
    "inspector_2_28": (Format.INSPECTOR, [0, 1]),
    "inspector_2_30": (Format.INSPECTOR, [0, 1, 2, 3]),
    "flight_recorder_gloo": (Format.FLIGHT_RECORDER, [0, 1]),
    "flight_recorder_nccl": (Format.FLIGHT_RECORDER, [0, 1, 2, 3]),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_every_sample_is_recognised(name):
    kinds = {recognise(file) for file in (SAMPLES / name).iterdir()} - {None}
    by_rank = read_recording(SAMPLES / name)
    assert (kinds, list(by_rank)) == ({FOLDERS[name][0]}, FOLDERS[name][1])
    assert all(by_rank.values())


def test_a_rank_that_left_json_and_a_pickle_is_read_once():
    recording = read_recording(SAMPLES / "flight_recorder_gloo")
    assert len(recording[0]) == 18


@pytest.mark.parametrize(
    ("content", "looks"),
    [
        (b"SQLite format 3\x00...", "an SQLite database such as Nsight Systems exports"),
        (b"nccl_bus_bandwidth_gbs{version=", "record with NCCL_INSPECTOR_PROM_DUMP=0"),
        (b"PK\x03\x04", "a zip archive; unpack it"),
        (b"step,loss\n", "an unknown format, beginning with b'step,loss"),
        (b'{"step": 1, "loss": 2.0}', "an unknown format, beginning with b'{"),
        (b'[{"name": "x", "cat": "kernel", "ph": "X"}]', "an unknown format"),
        (b"\x80\x04K\x01.", "an unknown format"),
        (b"", "empty"),
    ],
)
def test_anything_else_is_named_with_what_is_supported(tmp_path, content, looks):
    path = tmp_path / "profile.bin"
    path.write_bytes(content)
    with pytest.raises(ProfileError) as caught:
        read_recording(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert looks in said
    assert said.endswith("NCCL Inspector logs, torch flight-recorder dumps")


def test_folders_without_a_profile(tmp_path):
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (tmp_path / name).write_text("text")
    with pytest.raises(ProfileError, match=r"holds a\.txt, b\.txt, c\.txt and 1 more\); supported"):
        read_recording(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ProfileError, match="holds nothing"):
        read_recording(tmp_path / "empty")
    with pytest.raises(ProfileError, match="no such file or folder"):
        read_recording(tmp_path / "absent")


def test_two_formats_in_a_folder_are_refused(tmp_path):
    shutil.copy(SAMPLES / "inspector_2_28/node-a-pid977.log", tmp_path)
    shutil.copy(SAMPLES / "flight_recorder_nccl/collectives_rank_0.json", tmp_path)
    with pytest.raises(ProfileError, match="holds several formats") as caught:
        read_recording(tmp_path)
    assert "node-a-pid977.log" in str(caught.value)


def test_a_packed_file_that_was_cut_is_an_error(tmp_path):
    path = tmp_path / "node-a-pid977.log.gz"
    whole = gzip.compress((SAMPLES / "inspector_2_28/node-a-pid977.log").read_bytes())
    path.write_bytes(whole[:-40])
    with pytest.raises(ProfileError, match="cut short inside its gzip data"):
        read_recording(path)
