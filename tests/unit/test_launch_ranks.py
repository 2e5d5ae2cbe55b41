"""The number of ranks that the scripts of launch/ start, with a stand-in of nvidia-smi."""

import pytest

from tests import ROOT
from tests.commands import captured

# Two GPUs, one of them shared out.
LISTS = r"""#!/bin/sh
printf 'GPU 0: NVIDIA H100 (UUID: GPU-1a)\n  MIG 1g.10gb Device 0: (UUID: MIG-3c)\n'
printf 'GPU 1: NVIDIA H100 (UUID: GPU-2b)\n'
"""


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        (None, 2),
        ("0,1", 2),
        ("1", 1),
        ("GPU-2b, GPU-1a", 2),
        ("MIG-3c", 1),
        ("", 0),
        ("-1", 0),
        ("NoDevFiles", 0),
        ("1,-1,0", 1),
        ("7", 0),
    ],
)
def test_gpus_that_cuda_does_not_show_get_no_rank(tmp_path, visible, gpus):
    (tmp_path / "nvidia-smi").write_text(LISTS)
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    program = f'set -euo pipefail; source "{ROOT}/launch/ranks.sh"; moepp_gpus; moepp_ranks_here'
    done = captured(["bash", "-c", program], env=environment, check=True)
    assert done.stdout.split() == [str(gpus), str(gpus or 2)]
