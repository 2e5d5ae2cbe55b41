"""Groups of a rank are gone after it returns and after a user's error: the exit code is kept."""

from tests.commands import program, succeeded

SCRIPT = """
import torch.distributed as dist
from moepp_megatron.config.errors import ConfigError
from moepp_megatron.runtime.distributed import initialized, stop
from moepp_megatron.runtime.rank import RankEnvironment

for error in (None, ConfigError("wrong"), ValueError("a fault")):
    try:
        with initialized(RankEnvironment()) as device:
            assert dist.get_world_size() == 1
            if error is not None:
                raise error
    except (ConfigError, ValueError) as caught:
        assert caught is error
    print(device.type, type(error).__name__, dist.is_initialized())
stop()
"""


def test_groups_end_with_the_block_and_with_a_users_error(tmp_path):
    (tmp_path / "program.py").write_text(SCRIPT)
    done = succeeded(program(tmp_path / "program.py"))
    assert done.stdout.splitlines()[-3:] == [
        "cpu NoneType False",
        "cpu ConfigError False",
        # Other ranks may be in the middle of a collective.
        "cpu ValueError True",
    ]


CUT = """
import os
import numpy as np
from moepp_megatron.runtime.distributed import initialized
from moepp_megatron.runtime.rank import RankEnvironment

open("corpus.bin", "wb").write(bytes(1 << 20))
tokens = np.memmap("corpus.bin", dtype=np.uint8, mode="r")
with initialized(RankEnvironment()):
    os.truncate("corpus.bin", 4096)
    print(tokens.sum())
"""


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path):
    (tmp_path / "program.py").write_text(CUT)
    done = program(tmp_path / "program.py")
    assert done.returncode != 0
    assert "Fatal Python error: Bus error" in done.stderr
    assert "program.py" in done.stderr
