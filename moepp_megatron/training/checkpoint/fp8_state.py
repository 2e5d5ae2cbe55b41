"""Loads the histories and scales of delayed FP8 scaling, which Transformer Engine pickles.

Transformer Engine refuses to read such a pickle unless a variable of the environment allows it for
the whole process (its `_extra_state.py`, from 2.20 at the latest), because a crafted one could run
code. Here each of them is looked at first: it may name only what a history is made of, by literal
names, and change only objects that it made itself, so that a second reading does what the first one
did. Then megatron-core's unpickler reads it, and what that accepts, Transformer Engine may read,
while `torch.load` takes the tensors inside as data. Other recipes store nothing.
"""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.safe_globals import SafeUnpickler
from torch import Tensor

from moepp_megatron.config import ConfigError
from moepp_megatron.training.checkpoint.data_only import only_data
from moepp_megatron.training.checkpoint.plain_pickle import read_plain

_ALLOW = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


@contextmanager
def checked_fp8_state(state: dict[str, Any]) -> Iterator[None]:
    """A context in which Transformer Engine may read the FP8 state in `state`, which is checked.

    Args:
        state: A model's state, `name: tensor or object`, as it was read from a checkpoint.

    Raises:
        ConfigError: If an entry holds anything but numbers, tensors and recipes.
    """
    # Without Transformer Engine nobody reads them.
    if importlib.util.find_spec("transformer_engine") is None:
        yield
        return
    entries = {name: value for name, value in state.items() if "_extra_state" in name}
    pickles = {name: value for name, value in entries.items() if not _is_empty(value)}
    for name, value in pickles.items():
        _refuse_unsafe(name, value)
    if not pickles:
        yield
        return
    before = os.environ.get(_ALLOW)
    os.environ[_ALLOW] = "1"
    try:
        with only_data():
            yield
    finally:
        if before is None:
            del os.environ[_ALLOW]
        else:
            os.environ[_ALLOW] = before


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, Tensor) and value.numel() == 0)


def _refuse_unsafe(name: str, value: Any) -> None:
    try:
        if not isinstance(value, Tensor):
            raise TypeError(f"a {type(value).__name__}, not bytes in a tensor")
        # The very bytes that Transformer Engine takes, whatever the tensor's type.
        content = value.detach().cpu().numpy().tobytes()
        # What makes a tensor of a subclass calls what it is given.
        read_plain(content, lambda name: name.module != "torch._tensor" and "." not in name.name)
        with only_data():
            SafeUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # whatever crafted or damaged bytes make an unpickler do
        # torch explains at length how to read it all the same.
        reason = str(error).split(". ")[0]
        raise ConfigError(
            f"checkpoint entry {name} must hold the history of delayed FP8 scaling and nothing "
            f"else ({reason}); load another checkpoint"
        ) from error
