"""Full disks: recognises a write that failed for lack of space, and measures free space."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_SPACE = os.strerror(errno.ENOSPC)
# What stands for a file's name in errors of printing.
STDOUT = "stdout"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def _refusal(error: BaseException) -> OSError | None:
    """The OSError behind an exception of a write; None if there is none.

    `torch.save` raises a RuntimeError about positions in its archive, "[enforce fail at
    inline_container.cc]", when a write fails under it. The OSError is then its context.
    """
    links = (link for link in causes(error) if isinstance(link, OSError) and link.errno is not None)
    return next(links, None)


def causes(error: BaseException) -> list[BaseException]:
    """An exception and its causes, ten at most, since they can form a cycle."""
    chain = [error]
    while (link := chain[-1].__cause__ or chain[-1].__context__) and len(chain) < 10:
        chain.append(link)
    return chain


def is_full(error: BaseException) -> bool:
    """True if a write failed because the disk, or the user's quota, is full."""
    reason = _refusal(error)
    return reason is not None and reason.errno in _FULL


@contextmanager
def naming_stream(is_stderr: bool) -> Iterator[None]:
    """Context: an OSError from printing names the stream, as one of a file names the file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or ("stderr" if is_stderr else STDOUT)
        raise


def write_error(error: BaseException, path: Path) -> OSError:
    """Turn the exception of a failed write of `path` into an OSError with file and reason."""
    reason = _refusal(error)
    if reason is not None:
        return OSError(reason.errno, reason.strerror, str(path))
    return OSError(f"{path}: {type(error).__name__}: {error}")


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write where `folder` is or would be; OSError if unknown."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def show_bytes(count: int) -> str:
    """A number of bytes for people: `12.3 MiB`."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
