"""Resolves the user's sources to a fixed order of files, and computes their fingerprints."""

import dataclasses
import hashlib
import os
import stat
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.paths import hub_id, looked_at, path_problem
from moepp_megatron.data.manifest import CORPUS, SourceSummary
from moepp_megatron.data.source_files import COMPRESSIONS, Format, SourceFile
from moepp_megatron.data.source_filters import companions, is_table
from moepp_megatron.file_names import DATA_MANIFEST_FILE

_STDLIB = "stdlib"
_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_SITE_FOLDERS = frozenset({"site-packages", "dist-packages"})


@dataclass(frozen=True)
class TextSource:
    """One SOURCE argument and its files, in the order they are read."""

    name: str
    files: tuple[SourceFile, ...]

    def summary(self, documents: int, skipped: int, tokens: int) -> SourceSummary:
        """Make its manifest entry."""
        return SourceSummary(self.name, len(self.files), self.size, documents, skipped, tokens)

    @property
    def size(self) -> int:
        """Bytes in all files."""
        return sum(file.size for file in self.files)


def resolve_sources(names: Sequence[str], out: Path | None = None) -> list[TextSource]:
    """Find the files of every source; return one `TextSource` per name, in the given order.

    Args:
        names: files, folders, or the word `stdlib` (a folder of that name is `./stdlib`); any of
            them as `NAME=PATH`, which gives the data source a name of its own.
        out: the folder that is written, which must not lie in a source.

    Raises:
        ConfigError: no sources, or one that is missing, unreadable, without a non-empty file, with
            a link that leads out of it, around `out`, or with a file of another one.
    """
    if not names:
        raise ConfigError("SOURCE is missing; name files, folders or the word stdlib")
    sources = [_resolve(name, out) for name in names]
    readers: dict[tuple[int, int], TextSource] = {}
    for source in sources:
        for file in source.files:
            status = _stat(source.name, file.path)
            first = readers.setdefault((status.st_dev, status.st_ino), source)
            if first is not source and file.size:
                # Documents that are there twice stand in training and in validation.
                raise ConfigError(
                    f"source {source.name} must not repeat {first.name}, which holds {file.path} "
                    "too; name it once"
                )
    return sources


def _resolve(given: str, out: Path | None) -> TextSource:
    own_name, name = _named(given)
    if name == _STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        files = _code_of_stdlib(root)
    elif not name:
        # As a path it would be the working directory.
        raise ConfigError(
            f"SOURCE ('{given}') must not be empty; name a file, a folder or the word stdlib"
        )
    else:
        root = Path(name)
        _check_named(name)
        mode = _stat(name, root).st_mode
        if stat.S_ISDIR(mode):
            if out is not None and out.resolve().is_relative_to(root.resolve()):
                # The next call would take it for a part of the text.
                raise ConfigError(
                    f"--out ({out}) must not lie in the source {name}; choose a folder elsewhere"
                )
            files = _walk(name, root)
            left_out = companions(name, root, [file.name for file in files])
            files = [file for file in files if file.name not in left_out]
        elif stat.S_ISREG(mode):
            files = [_source_file(name, root, root.name)]
        else:
            raise ConfigError(f"source {name} is neither a file nor a folder; write it to a file")
    source = TextSource(own_name or name, tuple(files))
    if not source.files:
        raise ConfigError(f"source {name} ({root}) holds no files; name one with text in it")
    if source.size == 0:
        raise ConfigError(f"source {name} is empty (0 bytes); name one with text in it")
    return source


def _named(given: str) -> tuple[str, str]:
    """The name that `NAME=PATH` gives, or an empty one, and the path."""
    # A path that holds the sign itself is a path where there is one.
    own_name, sign, path = given.partition("=")
    if not sign or "/" in own_name or Path(given).exists():
        return "", given
    if not own_name.strip():
        raise ConfigError(f"SOURCE ({given}) must have a name before =; write NAME=PATH, or PATH")
    return own_name, path


def _check_named(name: str) -> None:
    """Refuse what is no path of this machine."""
    dataset, problem = hub_id(name), path_problem(name)
    if dataset is not None and not os.path.lexists(name):
        raise ConfigError(
            f"source {name} must be a file or folder of this machine; if it is a dataset of the "
            f"Hub, fetch it and name its folder: hf download {dataset} --repo-type dataset "
            f"--local-dir {dataset.split('/')[1]}"
        )
    if problem is not None:
        raise ConfigError(f"source {name} {problem.rule}; {problem.remedy}")


def _code_of_stdlib(root: Path) -> list[SourceFile]:
    # Distributions link files of it to other places. A package is a group, as is a lone module.
    files = _walk(_STDLIB, root, only_suffix=".py", skip_folders=_SITE_FOLDERS, may_leave=True)
    try:
        return [
            dataclasses.replace(file, group=file.name.split("/")[0])
            for file in files
            if not is_table(file.name, file.path)
        ]
    except OSError as error:
        raise ConfigError(
            f"source {_STDLIB}: {error.filename} cannot be read ({error.strerror})"
        ) from error


def _walk(
    source: str,
    root: Path,
    only_suffix: str | None = None,
    skip_folders: frozenset[str] = frozenset(),
    may_leave: bool = False,
) -> list[SourceFile]:
    """Regular, not hidden files below root, sorted by their path within it."""

    def fail(error: OSError) -> None:
        raise ConfigError(f"source {source}: {error.filename} cannot be read ({error.strerror})")

    real_root = root.resolve()
    result: list[SourceFile] = []
    for folder, folders, files in os.walk(root, onerror=fail):
        here = Path(folder)
        if {DATA_MANIFEST_FILE, f"{CORPUS}.idx"} <= set(files):
            raise ConfigError(
                f"source {source}: {here} must be text, and is a folder that moepp data prepare "
                "wrote; name the text that it was made from, or train on it as a part of data.blend"
            )
        folders[:] = [
            name for name in folders if not name.startswith(".") and name not in skip_folders
        ]
        wanted = [name for name in files if not name.startswith(".")]
        if not may_leave:
            # Links to folders are not followed: what they lead to is read where it is.
            _refuse_links_out(source, real_root, [here / name for name in (*folders, *wanted)])
        for name in wanted:
            if only_suffix and not name.endswith(only_suffix):
                continue
            path = here / name
            # Opening a pipe or a device that happens to lie in a folder would block for ever.
            if stat.S_ISREG(_stat(source, path).st_mode):
                result.append(_source_file(source, path, path.relative_to(root).as_posix()))
    return sorted(result, key=lambda file: file.name)


def _refuse_links_out(source: str, real_root: Path, paths: Sequence[Path]) -> None:
    """Whoever made a corpus must not have other files of this machine read into it."""
    for path in paths:
        target = path.resolve() if path.is_symlink() else real_root
        if not target.is_relative_to(real_root):
            raise ConfigError(
                f"source {source}: {path} must not be a link that leaves the source (to {target}); "
                "remove it, name what it leads to as a source, or copy the folder with cp -rL"
            )


def _stat(source: str, path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise ConfigError(
            f"source {source}: {path} cannot be read ({error.strerror}){looked_at(path)}; "
            "check the path"
        ) from error


def _source_file(source: str, path: Path, name: str) -> SourceFile:
    status = _stat(source, path)
    compression = COMPRESSIONS.get(path.suffix.lower())
    # What `a.jsonl.gz` holds is named before the last suffix.
    inner = path if compression is None else path.with_suffix("")
    format = _FORMATS.get(inner.suffix.lower(), "text")
    if compression is not None and format in ("parquet", "arrow"):
        raise ConfigError(
            f"source {source}: {path} is compressed {format}; decompress it (tables are compressed "
            "inside)"
        )
    return SourceFile(
        path=path,
        name=name,
        format=format,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        compression=compression,
    )


def stat_fingerprint(sources: Sequence[TextSource]) -> str:
    """SHA-256 over names, sizes and modification times: no file is opened."""
    return _fingerprint(sources, lambda file: f"{file.mtime_ns}\0".encode())


def content_fingerprint(
    sources: Sequence[TextSource], advance: Callable[[int], None] = lambda _: None
) -> str:
    """Return the SHA-256 over names and contents; `advance` is called with the bytes read.

    Raises ConfigError if a file cannot be read.
    """

    def digest(file: SourceFile) -> bytes:
        try:
            with file.path.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").digest()
        except OSError as error:
            raise ConfigError(
                f"source {file.path} cannot be read ({error.strerror}); make it readable or leave "
                "it out"
            ) from error
        advance(file.size)
        return content

    return _fingerprint(sources, digest)


def _fingerprint(sources: Sequence[TextSource], of_file: Callable[[SourceFile], bytes]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"source\0{source.name}\0".encode())
        for file in source.files:
            # surrogateescape: file names need not be UTF-8.
            digest.update(f"{file.name}\0{file.size}\0".encode(errors="surrogateescape"))
            digest.update(of_file(file))
    return digest.hexdigest()
