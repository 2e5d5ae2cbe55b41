"""Consistency check: settings and versions that must match on all machines and ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from moepp_megatron.config import Config
from moepp_megatron.training.checkpoint import NoStartError
from moepp_megatron.training.checkpoint.progress import package_versions

if TYPE_CHECKING:
    from torch.distributed import Store


def must_be_alike(config: Config) -> dict[str, str]:
    """Versions and settings by name, long values shortened to their beginning and a digest."""
    alike = package_versions()
    for section, keys in config.model_dump(mode="json").items():
        for key, value in keys.items():
            text = json.dumps(value)
            # An environment variable holds all of them, and 128 KiB at most.
            is_long, digest = len(text) > 200, hashlib.sha256(text.encode()).hexdigest()
            alike[f"{section}.{key}"] = f"{text[:60]}... ({digest[:8]})" if is_long else text
    # Python and local disks may differ.
    for name in ("python", "checkpoint.staging"):
        del alike[name]
    return alike


def refuse_unlike(store: Store, rank: int, world_size: int, alike: Mapping[str, str]) -> None:
    """Refuse ranks whose settings differ, through the store where they meet; every rank calls.

    Without it ranks train with each their own, or wait for each other in collectives.

    Raises:
        NoStartError: On all ranks; names the first setting of the first rank that differs.
    """
    if rank == 0:
        store.set("settings", json.dumps(alike))
    first = json.loads(store.get("settings"))
    differing = [name for name in {**first, **alike} if first.get(name) != alike.get(name)]
    others = f" ({len(differing) - 1} other settings differ too)" if len(differing) > 1 else ""
    said = [
        f"{name} ({first.get(name)} on rank 0) must be the same on all ranks, and is "
        f"{alike.get(name)} on rank {rank}{others}; start all with the same options, settings and "
        "packages"
        for name in differing[:1]
    ]
    store.set(f"said {rank}", "".join(said))
    if rank == 0:
        of_ranks = (store.get(f"said {each}").decode() for each in range(world_size))
        store.set("refusal", next(filter(None, of_ranks), ""))
    if not (refusal := store.get("refusal").decode()):
        return
    store.set(f"read {rank}", "")
    if rank == 0:
        # It may serve the store to the others.
        store.wait([f"read {each}" for each in range(world_size)])
    raise NoStartError(refusal)
