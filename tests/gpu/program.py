"""Runs one function on ranks of their own, on cards (NCCL) or on a CPU (gloo).

    python -m tests.gpu.program CALL FOLDER         (alone, or as a rank of torchrun)

CALL is a pickle of `Call`, written by `on_ranks`; FOLDER gets a pickle of each rank's result.
"""

import importlib
import os
import pickle
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.commands import captured


@dataclass(frozen=True)
class Call:
    """A module-level function, by name, and whether Transformer Engine is used where it is."""

    module: str
    name: str
    args: tuple[Any, ...]
    transformer_engine: bool


def on_ranks(function, *args, nproc=1, transformer_engine=False):
    """Return the values of `function(*args)` on each of `nproc` ranks, one a card."""
    call = Call(function.__module__, function.__qualname__, args, transformer_engine)
    # By address: a machine without a network may not know its own name.
    torchrun = ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    launcher = ["-m", *torchrun, f"--nproc-per-node={nproc}"]
    command = [sys.executable, *(launcher if nproc > 1 else []), "-m", "tests.gpu.program"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "call").write_bytes(pickle.dumps(call))
        done = captured([*command, folder / "call", folder], cwd=ROOT, timeout=280)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-8000:]}"
        return [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(nproc)]


def main():
    # Called by its name in the package: this module is __main__, and the pickle knows tests.gpu.
    from moepp_megatron.runtime import cpu_support, optional

    cpu_support.install()
    call = pickle.loads(Path(sys.argv[1]).read_bytes())
    if not call.transformer_engine:
        # Before anything takes it by name.
        optional.have_transformer_engine = lambda: False  # type: ignore[assignment]
    elif os.environ.get("MOEPP_TE_STAND_IN") == "1":
        from tests.te_stand_in.models import count_stand_in

        count_stand_in(pytest.MonkeyPatch())
    from moepp_megatron.runtime import distributed
    from moepp_megatron.runtime.rank import RankEnvironment

    rank = RankEnvironment.read()
    distributed.start(rank)
    result = getattr(importlib.import_module(call.module), call.name)(*call.args)
    (Path(sys.argv[2]) / f"rank{rank.rank}").write_bytes(pickle.dumps(result))
    distributed.stop()


if __name__ == "__main__":
    main()
