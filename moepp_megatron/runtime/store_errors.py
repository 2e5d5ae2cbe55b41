"""Classification of the errors of an object store's client.

The client turns botocore's errors into others, and some of them not at all. What was asked for is
missing, the address or the credentials are wrong, or the store cannot be reached: which of these
it is decides what a run does.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from moepp_megatron.config import UnfitError
from moepp_megatron.config.paths import without_password
from moepp_megatron.runtime.disk import causes

_DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "403"}
# Raised by botocore before it has asked anybody.
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}


class StoreError(UnfitError):
    """A store could not be asked, or has refused. What the store holds is unknown.

    Not an OSError: code that takes an unreadable file for a damaged one must not take a lost
    connection for damage. `is_refusal` if the address or the credentials are wrong.
    """

    def __init__(self, text: str, *, is_refusal: bool = False) -> None:
        super().__init__(text)
        self.is_refusal = is_refusal


def as_store_error(error: Exception, path: Path) -> Exception:
    """A FileNotFoundError or a StoreError for a client's error, which came of asking for `path`."""
    chain = causes(error)
    codes = {_code(link) for link in chain} | {type(link).__name__ for link in chain}
    if "NoSuchBucket" in codes:
        bucket = "/".join(str(path).split("/")[:3])
        text = f"the bucket {bucket} does not exist; create it, or name another"
        return StoreError(text, is_refusal=True)
    if codes & _NO_CREDENTIALS:
        text = f"no credentials were found for {path}; set AWS_ACCESS_KEY_ID and the secret, or "
        return StoreError(f"{text}a profile of AWS's files", is_refusal=True)
    if codes & _DENIED or any(isinstance(link, PermissionError) for link in chain):
        what = next(iter(sorted(codes & _DENIED - {"403"})), "AccessDenied")
        text = f"the credentials do not allow it ({what} at {path}); get the right, or use others"
        return StoreError(text, is_refusal=True)
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    # botocore's own says most; what others made of it repeats it.
    own = next((link for link in chain if type(link).__module__.startswith("botocore")), chain[-1])
    return StoreError(
        f"{path} could not be reached or used ({type(own).__name__}: {one_line(own)})"
    )


def _code(error: BaseException) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code")) if isinstance(response, dict) else ""


def one_line(error: BaseException) -> str:
    """An error's text without passwords and signatures of addresses in it."""
    text = re.sub(r"\?[^\s\"']*", "", " ".join(str(error).split()))
    return without_password(text)
