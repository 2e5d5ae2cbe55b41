"""The changes of CPU ranks to torch, seen by other packages in the same process."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.commands import program, succeeded

_SCRIPT = """
from moepp_megatron.runtime import cpu_support
cpu_support.install()
import torch
with torch.device("meta"):
    made = [torch.arange(2), torch.empty(2), torch.zeros(2), torch.tensor([1.0])]
assert {one.device.type for one in made} == {"meta"}, [one.device for one in made]
assert torch.arange(2, device="cuda").device.type == "cpu"
"""


def test_a_context_of_a_device_still_acts_on_factories(tmp_path):
    """Transformers builds models so; with other devices, their rotary frequencies stay garbage."""
    (tmp_path / "program.py").write_text(_SCRIPT)
    succeeded(program(tmp_path / "program.py"))


def _two_groups():
    """Groups with timeouts of their own, which add up and share a device."""
    seconds = (50, 77)
    groups = [dist.new_group(timeout=timedelta(seconds=each)) for each in seconds]
    for group in groups:
        value = torch.ones(1)
        dist.all_reduce(value, group=group)
        assert value == 2
    cpu = torch.device("cpu")
    made = [group._get_backend(cpu).options for group in groups]  # type: ignore[union-attr]
    assert [options._timeout for options in made] == [timedelta(seconds=each) for each in seconds]
    (first,), (second,) = (options._devices for options in made)
    assert first is second
    # Who chooses devices has them.
    chosen = dist.ProcessGroupGloo._Options()
    chosen._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
    group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, chosen)
    assert group.options._devices[0] is chosen._devices[0]


@pytest.mark.parallel
def test_groups_share_a_device(ranks):
    ranks(2).run(_two_groups)
