"""A real trace of torch's profiler, of one process; files that are no trace."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from moepp_megatron.features.profile.ranges import Ranges
from moepp_megatron.tools.profiling.analysis import analyse
from moepp_megatron.tools.profiling.trace import ProfileError


class Part(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x).relu()


def test_without_collectives(tmp_path):
    first, second = Part(), Part()
    ranges = Ranges()
    ranges.around(first, "forward", "layer1/experts")
    ranges.around(second, "forward", "layer2/experts")
    with (
        profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded,
        record_function("moepp/step/1"),
    ):
        second(first(torch.randn(4, 8))).sum().backward()
    ranges.undo()
    assert "forward" not in vars(first)
    recorded.export_chrome_trace(str(tmp_path / "rank0.pt.trace.json"))
    found = analyse(tmp_path)
    assert found.classes == []
    assert found.exposed_share == 0.0
    time = found.times[1][0]
    # The thread computes unless it waits.
    assert 0 < time.compute_us == time.step_us


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a whole JSON file"),
        (b"[]", "has no traceEvents"),
        (b'{"traceEvents": []}', "none of the ranges moepp/step/N"),
        (b"\x1f\x8b\x08\x00", "cut short inside its gzip data"),
    ],
)
def test_files_that_are_no_profile(tmp_path, content, message):
    (tmp_path / "rank0.pt.trace.json").write_bytes(content)
    with pytest.raises(ProfileError, match=message):
        analyse(tmp_path)


def test_folders_that_are_no_profile(tmp_path):
    with pytest.raises(ProfileError, match=r"training.profile_steps=\[10,11\]"):
        analyse(tmp_path)
    trace = json.dumps({"traceEvents": []})
    for name in ("rank1.pt.trace.json", "rank1.again.pt.trace.json"):
        (tmp_path / name).write_text(trace)
    with pytest.raises(ProfileError, match="one trace a rank"):
        analyse(tmp_path)
    (tmp_path / "rank1.again.pt.trace.json").unlink()
    (tmp_path / "rank1.meta.json").write_text('{"format": 2}')
    with pytest.raises(ProfileError, match="field 'format': input should be 1"):
        analyse(tmp_path)
