"""Reads files that somebody else may have made: regular ones, and of these no more than a limit."""

import errno
import os
import stat
from pathlib import Path

from moepp_megatron.config.errors import ConfigError


def check_regular(path: Path) -> None:
    """Raise OSError unless `path` is a regular file: reading a pipe or a device may never end."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def read_text(path: Path, name: str, limit: int | None = None, newline: str | None = None) -> str:
    """Return the text of a regular file in UTF-8, at most `limit` characters of it.

    `name` is the user's name of it, such as `--text`. `newline` is as for `open`; an empty one
    keeps carriage returns. ConfigError if it cannot be read, is no regular file or is not UTF-8.
    """
    try:
        check_regular(path)
        with path.open(encoding="utf-8", newline=newline) as file:
            text: str = file.read(-1 if limit is None else limit)
    except OSError as error:
        raise ConfigError(
            f"{name} ({path}) cannot be read ({error.strerror}); name a text file"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name} ({path}) must be text in UTF-8, and is another kind of file, or in another "
            f"encoding ({error.reason}); name a text file, or write one: iconv -f LATIN1 -t UTF-8"
        ) from None
    return text
