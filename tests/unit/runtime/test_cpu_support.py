"""What CPU ranks change in torch, seen by other packages in the same process."""

from __future__ import annotations

import subprocess
import sys

_SCRIPT = """
from moepp_megatron.runtime import cpu_support
cpu_support.install()
import torch
with torch.device("meta"):
    made = [torch.arange(2), torch.empty(2), torch.zeros(2), torch.tensor([1.0])]
assert {one.device.type for one in made} == {"meta"}, [one.device for one in made]
assert torch.arange(2, device="cuda").device.type == "cpu"
"""


def test_a_context_of_a_device_still_acts_on_factories() -> None:
    """Transformers builds models so; with other devices, their rotary frequencies stay garbage."""
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
