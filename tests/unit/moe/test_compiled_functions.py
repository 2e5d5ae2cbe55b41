"""megatron-core's fused functions, which torch.compile compiles on a GPU only."""

import os
import sys

import pytest

from tests.commands import captured, succeeded


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sizes_that_change_are_compiled_twice(tmp_path):
    # A process of its own: here and on CPU ranks nothing is compiled.
    left_out = ("TORCHDYNAMO_DISABLE", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    done = succeeded(
        captured(
            [sys.executable, "-m", "tests.unit.moe.compile_fused"],
            env=environment | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        )
    )
    found = {
        name: (int(n), float(error))
        for name, n, error in map(str.split, done.stdout.splitlines()[-3:])
    }
    # Functions times compilations: for the first size, for any size, for one row.
    most = {"swiglu": 2 * 3, "bias_dropout_add": 1 * 2, "cross_entropy": 4 * 2}
    assert {name: count for name, (count, _) in found.items()} == most
    # One rounding to bf16 more or less.
    assert max(error for _, error in found.values()) < 2**-7
