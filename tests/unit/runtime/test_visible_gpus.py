"""NVML's numbers of the GPUs that CUDA shows."""

import pytest

from moepp_megatron.runtime.nvml import Nvml
from tests.unit.tools.doctor.fake_nvml import FakeNvml, answers

MIG = "MIG-11111111-2222-3333-4444-55555555555"
CARDS = [answers(0), answers(1), answers(2, mig=[f"{MIG}0", f"{MIG}1"]), answers(3)]
LAST = answers(3)["nvmlDeviceGetUUID"]


@pytest.mark.parametrize(
    ("variable", "indices"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("2,0", [2, 0]),
        (" 1 , 3", [1, 3]),
        # CUDA stops at the first that is none.
        ("1,-1,2", [1]),
        ("1,4,2", [1]),
        (LAST, [3]),
        ("GPU-00000003,GPU-00000001", [3, 1]),
        # The beginning of all of them.
        ("GPU-0000000", []),
        ("GPU-", []),
        (f"{MIG}1", [2]),
        (LAST.replace("GPU-", "MIG-GPU-") + "/7/0", [3]),
        ("deadbeef", []),
    ],
)
def test_cuda_visible_devices(variable, indices):
    environment = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    with Nvml(FakeNvml(*CARDS)) as nvml:
        assert nvml.visible(environment) == indices


def test_the_gpu_of_a_mig_device_is_found_by_the_uuid_that_cuda_gives():
    """torch.cuda gives the UUID without what stands before it."""
    with Nvml(FakeNvml(*CARDS)) as nvml:
        assert nvml.index_of([f"GPU-{MIG.removeprefix('MIG-')}1", LAST, "GPU-unknown"]) == [2, 3]
