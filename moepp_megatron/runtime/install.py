"""How to install what is missing: a command that works for the user who reads it."""

from __future__ import annotations

import shlex
import sys

TRANSFORMER_ENGINE = "launch/env.sh --te on a CUDA machine"
"""It is compiled against the torch that is there."""


def how_to_install(*requirements: str) -> str:
    """A command for the Python that runs this, whose environment need not be activated.

    The requirements are packages as pip takes them, such as ``transformers>=5``, and not an extra
    of this one: a clone that is used without being installed has no extras, and no registry has
    this package.
    """
    return shlex.join([sys.executable, "-m", "pip", "install", *requirements])
