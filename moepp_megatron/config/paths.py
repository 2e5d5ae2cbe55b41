"""Refuses texts that cannot be a path of this machine."""

import os
import re
from pathlib import Path
from typing import NamedTuple

# One letter is a drive: C:/data is an unusual name on this system, but not an address.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
# Of object storage; a path would keep one slash of two.
_ADDRESS = re.compile(r"(s3|msc):/+([^/]*)(.*)")
# Up to the last @: a secret of AWS may hold slashes, and what is written by hand anything.
_PASSWORD = re.compile(r"(:/+)[^\s\"']*@")
_HUB = re.compile(
    r"(?:https?://huggingface\.co/|hf://)(?:datasets/)?([\w.-]+/[\w.-]+).*|([\w.-]+/[\w.-]+)"
)
_VARIABLE = re.compile(r"\$\{?[A-Za-z_]")
# Of Linux (limits.h): bytes of a name between two slashes, and of a whole path.
_NAME_MAX, _PATH_MAX = 255, 4095


class _PathProblem(NamedTuple):
    """Why a text is no path: the rule that it breaks, and what to write instead."""

    rule: str
    remedy: str


_UNEXPANDED = _PathProblem(
    "must be written out, since variables are not expanded here",
    "give the path itself (on the command line double quotes let the shell put it in)",
)


def looked_at(path: Path) -> str:
    """`, looked at /data/mine` for a message about a relative path; nothing for another."""
    is_clear = is_address(str(path)) or path.is_absolute()
    return "" if is_clear else f", looked at {os.path.abspath(path)}"


def hub_id(text: str) -> str | None:
    """The model or dataset of the Hub that `text` names; None if it can be a path that is wrong."""
    match = _HUB.fullmatch(text)
    return None if match is None or Path(text).parent.exists() else match[1] or match[2]


def is_address(text: str) -> bool:
    """True if `text` is an object storage address: `s3://bucket/...`, `msc://profile/...`."""
    return _ADDRESS.match(text) is not None


def without_password(text: str) -> str:
    """`text` without user and password of an address in it."""
    return _PASSWORD.sub(r"\1***@", text)


def place_problem(text: str) -> _PathProblem | None:
    """Same as `path_problem`, for a setting that may also be an address of object storage."""
    address = _ADDRESS.fullmatch(text)
    if address is None:
        scheme = text.partition(":")[0]
        if scheme in ("s3", "msc") and scheme != text:
            # A folder of that name could be meant, but hardly ever is.
            return _PathProblem(
                "must have two slashes after the colon", f"write {scheme}://NAME/PREFIX"
            )
        problem = path_problem(text)
        if problem is None or _SCHEME.match(text) is None:
            return problem
        return _PathProblem("must be a path, s3://bucket/prefix or msc://profile/path", "use one")
    if "@" in text:
        # Configurations are copied, logged and reported.
        return _PathProblem(
            "must not hold a user or password",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile of AWS's files",
        )
    if not address[2] or not address[3].strip("/"):
        return _PathProblem(
            "must name a bucket (or profile) and a prefix in it", f"use {address[1]}://NAME/PREFIX"
        )
    if _VARIABLE.search(text) is not None:
        return _UNEXPANDED
    if re.search(r"[\s?#\\\0-\x1f]|/\.{1,2}(/|$)", text):
        return _PathProblem(
            "must hold no space, ?, #, backslash, . or .. as a name", "leave it out"
        )
    return None


def path_problem(text: str) -> _PathProblem | None:
    """Why `text` cannot be the path of a file or folder of this machine; None if it can.

    An address such as `s3://bucket` would otherwise become a folder `s3:` in the working directory.
    """
    scheme = _SCHEME.match(text)
    if scheme is not None:
        return _PathProblem(
            f"must be a path of this machine, and {scheme[1]}:// is not supported",
            "mount it and give the path, or copy it to a local folder",
        )
    try:
        content = text.encode()
    except UnicodeEncodeError:
        return _PathProblem("must be a path in UTF-8", "rename the file or folder")
    if b"\0" in content:
        return _PathProblem("must hold no zero byte", "give a path")
    if _VARIABLE.search(text) is not None and not os.path.lexists(text):
        return _UNEXPANDED
    if len(content) > _PATH_MAX or any(len(name) > _NAME_MAX for name in content.split(b"/")):
        return _PathProblem(
            f"must have names of at most {_NAME_MAX} bytes, {_PATH_MAX} in all", "shorten it"
        )
    return None
