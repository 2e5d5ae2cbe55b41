"""Where the training thread is stuck, from its Python stack."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType

_C10D = "distributed_c10d.py"
# Frames of the machinery around a wait, which say nothing about the program.
_UNINTERESTING = ("/torch/", "/threading.py", "/contextlib.py")


def collective_of(frame: FrameType | None) -> str | None:
    """The outermost `torch.distributed` call in a stack and its group; None if there is none."""
    found = None
    while frame is not None:
        code = frame.f_code
        if code.co_filename.endswith(_C10D) and not code.co_name.startswith(("_", "wrapper")):
            found = f"{code.co_name}{_group_of(frame)}"
        frame = frame.f_back
    return found


def place_of(frame: FrameType | None) -> str:
    """The innermost frame of this project, megatron or a user, as `file:line in function`."""
    innermost = frame
    while frame is not None:
        if not any(part in frame.f_code.co_filename for part in _UNINTERESTING):
            return _show(frame)
        frame = frame.f_back
    return _show(innermost) if innermost is not None else "an unknown place"


def main_thread_frame() -> FrameType | None:
    """The innermost frame of the main thread."""
    return sys._current_frames().get(threading.main_thread().ident or 0)


def _group_of(frame: FrameType) -> str:
    """` over the N ranks of GROUP`, from the call's arguments."""
    import torch.distributed as dist

    group = frame.f_locals.get("group") or dist.group.WORLD
    if group is None:
        return ""
    try:
        return f" over the {group.size()} ranks of group {group.group_desc or group.group_name}"
    except (AttributeError, RuntimeError):
        return ""


def _show(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{'/'.join(path.parts[-3:])}:{frame.f_lineno} in {frame.f_code.co_name}"
