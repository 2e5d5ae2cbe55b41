"""Groups of a rank are gone after it returns and after a user's error: the exit code is kept."""

from pathlib import Path

from tests.commands import program

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


def test_groups_end_with_the_block_and_with_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SCRIPT)
    done = program(tmp_path / "program.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == [
        "cpu NoneType False",
        "cpu ConfigError False",
        # Other ranks may be in the middle of a collective.
        "cpu ValueError True",
    ]
