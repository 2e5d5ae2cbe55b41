"""The corpus of `benchmarks.pilot_large`: sources of Python's library and of installed packages.

`constraints.txt` pins the packages; their versions, sizes and checksums are recorded with the
results, so that runs on another corpus are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from moepp_megatron.config import ConfigError
from moepp_megatron.data.prepare import PrepareSettings, prepare
from moepp_megatron.data.sources import resolve_sources
from moepp_megatron.data.stdlib import is_table
from moepp_megatron.runtime.atomic import lock, write_atomic

STDLIB = "stdlib"
# Larger files are mostly tables that a model would learn by heart.
_LARGEST_BYTES = 200_000


def prepare_corpus(folder: Path, sources: Sequence[str], vocab_size: int) -> dict[str, Any]:
    """Write the prepared corpus to `folder`/data unless it is there.

    Args:
        folder: For the texts, one JSONL file a source, and the corpus.
        sources: "stdlib" and names of installed distributions.
        vocab_size: Of the tokenizer that is trained.

    Returns:
        The description: files, bytes, tokens and SHA-256 of each source, by its name.

    Raises:
        ConfigError: A package is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as held:
        # Of two workers that begin together, one prepares.
        lock(held.fileno(), waits=True)
        record = folder / "corpus.json"
        if not record.exists():
            described = _prepared(folder, sources, vocab_size)
            write_atomic(record, json.dumps(described, indent=1).encode())
        found: dict[str, Any] = json.loads(record.read_bytes())
        return found


def _prepared(folder: Path, sources: Sequence[str], vocab_size: int) -> dict[str, Any]:
    described = {name: _write_text(folder / f"{name}.jsonl", name) for name in sources}
    named = [f"{name}={folder / name}.jsonl" for name in sources]
    manifest = prepare(named, folder / "data", PrepareSettings(vocab_size=vocab_size)).manifest
    for source in manifest.sources:
        described[source.name]["tokens"] = source.tokens
    return described


def _write_text(target: Path, source: str) -> dict[str, Any]:
    """One line per file, in the order of names."""
    lines = [json.dumps({"text": text}) + "\n" for text in map(_text, _files(source)) if text]
    content = "".join(lines).encode()
    write_atomic(target, content)
    return {
        "version": None if source == STDLIB else metadata.version(source),
        "files": len(lines),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _files(source: str) -> list[Path]:
    if source == STDLIB:
        found = [file.path for file in resolve_sources([STDLIB])[0].files]
    else:
        try:
            package = metadata.distribution(source)
        except metadata.PackageNotFoundError:
            raise ConfigError(
                f"{source} must be installed, because its sources are part of the corpus; install "
                "what constraints.txt names"
            ) from None
        names = sorted(str(file) for file in package.files or [] if file.suffix == ".py")
        paths = [(name, Path(str(package.locate_file(name)))) for name in names]
        found = [path for name, path in paths if path.exists() and not is_table(name, path)]
    return [path for path in found if path.stat().st_size < _LARGEST_BYTES]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip()
