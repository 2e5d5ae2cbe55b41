"""Paths of objects in a store such as S3, which are read and written as files are.

NVIDIA's multi-storage client, which megatron-core has an interface to as well, makes the requests:
`s3://bucket/prefix` takes endpoint and credentials from where AWS's own tools take them,
`msc://profile/path` all that its configuration file says. An object is written whole, by one
request or an upload in parts, and has CRC32 checksums on its way; there is no renaming.
"""

import contextlib
import errno
import fnmatch
import functools
import io
import logging
import os
import re
import secrets
import stat as stat_modes
from collections.abc import Generator, Iterator
from pathlib import Path, PosixPath
from types import SimpleNamespace
from typing import Any, NoReturn

from moepp_megatron.config import ConfigError, UnfitError
from moepp_megatron.config.paths import is_address, without_password
from moepp_megatron.runtime.disk import causes
from moepp_megatron.runtime.optional import how_to_install

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


def _as_store_error(error: Exception, path: Path) -> Exception:
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
        f"{path} could not be reached or used ({type(own).__name__}: {_one_line(own)})"
    )


def _code(error: BaseException) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code")) if isinstance(response, dict) else ""


def _one_line(error: BaseException) -> str:
    """An error's text without passwords and signatures of addresses in it."""
    text = re.sub(r"\?[^\s\"']*", "", " ".join(str(error).split()))
    return without_password(text)


# Bytes asked for at once where a reader wants fewer: a request costs tens of milliseconds.
_BUFFER_BYTES = 8 << 20
_CONNECT_TIMEOUT_S = 10
_READ_TIMEOUT_S = 60
# The first try and, after a second or two, two more.
_ATTEMPTS = 3


def place(name: str | Path) -> Path:
    """The path that a user means: of a store for an address, otherwise of this machine."""
    if isinstance(name, ObjectPath):
        return name
    return ObjectPath(name) if is_address(str(name)) else Path(os.path.expanduser(name))


class ObjectPath(PosixPath):
    """The path of an object, or of the objects below a prefix, which is their folder.

    It has the methods of a `Path` that checkpoints use. The operating system is never given one:
    `os.fspath` raises a TypeError. All methods that ask the store raise a `StoreError`.
    """

    # The client's entry, where a listing gave one.
    _entry: Any = None

    def __str__(self) -> str:  # noqa: D105
        # A path keeps one slash of two.
        return super().__str__().replace(":/", "://", 1)

    def __fspath__(self) -> NoReturn:  # noqa: D105
        raise TypeError(f"{self} is no path of this machine")

    def is_absolute(self) -> bool:
        """An address is."""
        return True

    def resolve(self, strict: bool = False) -> "ObjectPath":
        """The path itself."""
        return self

    absolute = expanduser = resolve

    def stat(self, *, follow_symlinks: bool = True) -> Any:
        """Size and time of change of an object; FileNotFoundError if missing."""
        if self._entry is None:
            with self._asking():
                return _status(self._client.info(self._key))
        return _status(self._entry)

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """True if there is an object of this name, or any below it."""
        return self.is_file() or self.is_dir()

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """True if there is an object of this name."""
        try:
            return stat_modes.S_ISREG(self.stat().st_mode)
        except FileNotFoundError:
            return False

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """True if there are objects below."""
        return next(self.iterdir(), None) is not None

    def iterdir(self) -> "Generator[ObjectPath]":
        """Yield the direct children; none where there is no such folder."""
        with self._asking():
            listing = list(self._client.list(path=self._prefix, include_directories=True))
        for item in listing:
            path = self / item.key.rstrip("/").rpartition("/")[2]
            path._entry = item
            yield path

    def glob(self, pattern: str, **_: Any) -> "Iterator[ObjectPath]":  # type: ignore[override]
        """Yield the direct children whose name matches this pattern."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def open(  # type: ignore[override]
        self, mode: str = "r", buffering: int = -1, encoding: str | None = None, **_: Any
    ) -> Any:
        """A reader of an object, which asks for ranges of it."""
        assert mode in ("r", "rb"), "objects are written whole"
        reader = _ObjectReader(self)
        if buffering == 0:
            return reader
        buffered = io.BufferedReader(reader, _BUFFER_BYTES)
        return buffered if mode == "rb" else io.TextIOWrapper(buffered, encoding or "utf-8")

    def read_range(self, offset: int, length: int) -> bytes:
        """Bytes of an object, by one request."""
        from multistorageclient.types import Range

        with self._asking():
            return bytes(self._client.read(self._key, byte_range=Range(offset, length)))

    def write_bytes(self, data: Any) -> int:
        """Write an object, replacing an existing one."""
        with self._asking():
            self._client.write(self._key, bytes(data))
        return len(data)

    def upload(self, file: Path) -> None:
        """Write an object from a file of this machine; a large one in parts, several at a time."""
        with self._asking():
            self._client.upload_file(self._key, str(file))

    def delete(self) -> None:
        """Delete the object, if there is one."""
        with self._asking():
            self._client.delete_many([self._key])

    def delete_below(self, last: str | None = None) -> None:
        """Delete all that is directly below; the object `last` in a request of its own before."""
        keys = [path._key for path in self.iterdir()]
        first = [key for key in keys if last is not None and key == (self / last)._key]
        rest = [key for key in keys if key not in first]
        with self._asking():
            for some in (first, rest):
                if some:
                    self._client.delete_many(some)

    @property
    def _key(self) -> str:
        return "/".join(self.parts[2:])

    @property
    def _prefix(self) -> str:
        return f"{self._key}/" if self._key else ""

    @property
    def _client(self) -> Any:
        scheme, bucket = self.parts[:2]
        # A client is of the process that made it.
        return _client(scheme.rstrip(":"), bucket, os.getpid())

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Turn the many errors of the client into FileNotFoundError and StoreError."""
        try:
            yield
        except (StoreError, ConfigError):
            raise
        except Exception as error:
            raise _as_store_error(error, self) from None


class _ObjectReader(io.RawIOBase):
    """The bytes of an object, each read of which is a request."""

    def __init__(self, path: ObjectPath) -> None:
        self._path = path
        self._size = path.stat().st_size
        self._position = 0

    def readable(self) -> bool:
        return True

    seekable = readable

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._position)
        if length <= 0:
            return 0
        content = self._path.read_range(self._position, length)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def readall(self) -> bytes:
        return self.read(max(0, self._size - self._position)) or b""


def check_store(folder: Path, setting: str, *, writes: bool) -> None:
    """Refuse a folder of a store that cannot be used; does nothing for one of this machine.

    With `writes` a small object is written and deleted; otherwise the folder is listed.
    ConfigError if there is no such bucket or profile, or the credentials do not allow it, and
    UnfitError if the store cannot be reached, or the client is not installed.
    """
    if not isinstance(folder, ObjectPath):
        return
    probe = folder / f".probe-{secrets.token_hex(8)}"
    try:
        if writes:
            probe.write_bytes(b"moepp")
            probe.delete()
        else:
            folder.is_dir()
    except FileNotFoundError:
        text = f"{setting} ({folder}) must be in a bucket that is there; create it, or name another"
        raise ConfigError(text) from None
    except StoreError as error:
        if error.is_refusal:
            raise ConfigError(f"{setting} ({folder}) must be usable, and {error}") from None
        raise StoreError(f"{setting} ({folder}) cannot be used from here: {error}") from None


@functools.cache
def _client(scheme: str, name: str, process: int) -> Any:
    try:
        import boto3  # noqa: F401 (the client's own import of it fails late)
        import multistorageclient as msc
    except ImportError as error:
        raise StoreError(
            f"{scheme}://{name} needs the package {error.name}, which is not installed; "
            f"{how_to_install('multi-storage-client[boto3]')}, or use a folder of this machine"
        ) from None
    # Every error that it logs is raised, too.
    logging.getLogger("multistorageclient").setLevel(logging.CRITICAL)
    if scheme == "msc":
        return _of_profile(msc, name)
    options = {
        "base_path": name,
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "read_timeout": _READ_TIMEOUT_S,
        "retries": {"mode": "standard", "max_attempts": _ATTEMPTS},
    }
    profiles = {name: {"storage_provider": {"type": "s3", "options": options}}}
    config = msc.StorageClientConfig.from_dict({"profiles": profiles}, profile=name)
    return msc.StorageClient(config)


def _of_profile(msc: Any, name: str) -> Any:
    try:
        return msc.StorageClient(msc.StorageClientConfig.from_file(profile=name))
    except Exception as error:  # its configuration file may be wrong in many ways
        raise StoreError(
            f"profile {name} of multi-storage-client cannot be used ({_one_line(error)}); name one "
            "of its configuration file, which MSC_CONFIG can name",
            is_refusal=True,
        ) from None


def _status(item: Any) -> Any:
    is_folder = item.type == "directory"
    return SimpleNamespace(
        st_size=item.content_length,
        st_mtime=0.0 if is_folder else item.last_modified.timestamp(),
        st_mode=stat_modes.S_IFDIR if is_folder else stat_modes.S_IFREG,
    )
