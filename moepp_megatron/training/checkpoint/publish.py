"""Turns the files of all ranks into a named checkpoint. Runs only on rank 0.

In a folder of this machine the checkpoint gets its name last. In object storage, where nothing can
be renamed, the ranks have uploaded their files under its name already, and the manifest, without
which they are no checkpoint, comes last.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.core.dist_checkpointing.core import CheckpointingConfig

from moepp_megatron.config import ConfigError
from moepp_megatron.data.tokenizer import Tokenizer, named_eod_token, tokenizer_config
from moepp_megatron.file_names import (
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    FORMAT_FILE,
    LATEST_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    TENSORS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from moepp_megatron.runtime.atomic import exchange, sync, write_atomic, write_synced
from moepp_megatron.runtime.object_store import ObjectPath, StoreError
from moepp_megatron.training.checkpoint.files import SavedRecord, damage, file_digest, manifest
from moepp_megatron.training.checkpoint.find import checkpoint_dates
from moepp_megatron.training.checkpoint.plan import SavePlan, Written
from moepp_megatron.training.checkpoint.retention import discard

logger = logging.getLogger(__name__)

# Between two checkpoints, where clocks do not show which one is newer.
_TICK_S = 1e-3


@dataclass(frozen=True)
class Companions:
    """Files stored with the tensors: resolved configuration (YAML), tokenizer, record."""

    config: str
    tokenizer: dict[str, bytes]
    record: SavedRecord


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """The tokenizer files of a checkpoint by name; empty if the file is not a tokenizer.

    Read once, when a run begins: the file may be replaced while it trains.
    """
    if not path.is_file():
        return {}
    try:
        Tokenizer.load(path)
    except ConfigError as error:
        logger.warning("checkpoints get no %s: %s", TOKENIZER_FILE, error)
        return {}
    files = {TOKENIZER_FILE: path.read_bytes()}
    # Only its name in the tokenizer distinguishes this token from others, and the data that say so
    # need not be there when the checkpoint is used.
    eod_token = named_eod_token(path)
    if eod_token is not None:
        files[TOKENIZER_CONFIG_FILE] = tokenizer_config(eod_token)
    template = path.with_name(CHAT_TEMPLATE_FILE)
    if template.is_file():
        files[CHAT_TEMPLATE_FILE] = template.read_bytes()
    return files


def publish(plan: SavePlan, final: Path, written: list[Written], companions: Companions) -> None:
    """Write index, companions and checksums, give the folder its name `final`, move `latest`.

    Raises:
        OSError: If the disk failed; there is then no checkpoint of that name, or the older one.
        StoreError: If the store failed; there is then no checkpoint of that name.
    """
    folder = plan.folder
    digests = {name: digest for part in written for name, digest in part.digests.items()}
    sizes = {name: size for part in written for name, size in part.sizes.items()}
    if isinstance(final, ObjectPath):
        _check_uploaded(final, sizes)
    else:
        _check_shared(folder, sizes)
    plan.write_index([part.results for part in written])
    _make_newest(companions.record, final.parent)
    contents = {
        CONFIG_FILE: companions.config.encode(),
        STATE_FILE: companions.record.to_json(),
        FORMAT_FILE: json.dumps(asdict(CheckpointingConfig("torch_dist"))).encode(),
        **companions.tokenizer,
    }
    for name, content in contents.items():
        write_synced(folder / name, content)
    for name in (*contents, TENSORS_FILE):
        digests[name], sizes[name] = file_digest(folder / name), (folder / name).stat().st_size
    write_synced(folder / MANIFEST_FILE, manifest(digests, sizes))
    latest = f"{final.name}\n".encode()
    if isinstance(final, ObjectPath):
        _upload(folder, final)
        (final.parent / LATEST_FILE).write_bytes(latest)
        return
    sync(folder)
    _give_name(folder, final)
    write_atomic(final.parent / LATEST_FILE, latest)
    sync(final.parent)


def upload(written: Written, folder: Path, final: ObjectPath) -> Written:
    """Upload the files that this rank has written into `folder`, and delete them there.

    Raises:
        StoreError: The store does not take them.
    """
    for name in written.digests:
        (final / name).upload(folder / name)
        (folder / name).unlink()
    return written


def _check_uploaded(final: ObjectPath, sizes: dict[str, int]) -> None:
    """Compare sizes of what the store has; the checksums were its own to compare."""
    there = {path.name: path.stat().st_size for path in final.iterdir()}
    for name, size in sizes.items():
        if there.get(name) != size:
            got = f"{there[name]} bytes" if name in there else "nothing"
            raise StoreError(f"{final / name} was uploaded with {size} bytes, and {got} is there")


def _make_newest(record: SavedRecord, folder: Path) -> None:
    """Date a checkpoint after all others, since a machine's clock may have been ahead."""
    others = [date + _TICK_S for date in checkpoint_dates(folder).values() if math.isfinite(date)]
    record.saved_at = max([record.saved_at, *others])


def _check_shared(folder: Path, sizes: dict[str, int]) -> None:
    """Check that every rank's files are seen here."""
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise OSError(
                f"{path} was written by another rank and is not here; checkpoint.dir must be a "
                "folder that all nodes share"
            )


def _upload(folder: Path, final: ObjectPath) -> None:
    """Upload what only rank 0 has written, the manifest last."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    del sizes[MANIFEST_FILE]
    for name in sizes:
        (final / name).upload(folder / name)
    _check_uploaded(final, sizes)
    (final / MANIFEST_FILE).upload(folder / MANIFEST_FILE)


def _give_name(folder: Path, final: Path) -> None:
    """Rename; an older checkpoint of that name goes if it is whole, and is kept aside if not."""
    token = folder.name.rpartition("-")[2]
    if final.exists():
        if damage(final) is not None:
            final.rename(final.with_name(f"{final.name}.unreadable-{token}"))
        elif exchange(folder, final):
            # At no moment is there no checkpoint of that name.
            shutil.rmtree(folder)
            return
        else:
            discard(final, token)
    folder.rename(final)
