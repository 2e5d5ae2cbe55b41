"""Settings and versions that must be the same on all machines and ranks of a run."""

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

# Of those that differ, so many are named.
_NAMED = 3


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
        NoStartError: On all ranks; names the settings, their values, and the ranks.
    """
    if rank == 0:
        store.set("settings", json.dumps(alike))
    first = json.loads(store.get("settings"))
    differing = {
        name: [first.get(name, "nothing"), alike.get(name, "nothing")]
        for name in {**first, **alike}
        if first.get(name) != alike.get(name)
    }
    store.set(f"differing {rank}", json.dumps(differing))
    if rank == 0:
        found = [json.loads(store.get(f"differing {each}")) for each in range(world_size)]
        store.set("refusal", _refusal(found))
    if not (refusal := store.get("refusal").decode()):
        return
    store.set(f"read {rank}", "")
    if rank == 0:
        # It may serve the store to the others.
        store.wait([f"read {each}" for each in range(world_size)])
    raise NoStartError(refusal)


def _refusal(found: list[dict[str, list[str]]]) -> str:
    """What differs from rank 0, by rank, in words; empty where nothing does."""
    names, parts = list(dict.fromkeys(name for each in found for name in each)), []
    for name in names[:_NAMED]:
        ranks = [rank for rank, each in enumerate(found) if name in each]
        (here, there), more = found[ranks[0]][name], len(ranks) - 1
        others = f" and {more} more" if more else ""
        parts.append(f"{name} ({here} on rank 0, {there} on rank {ranks[0]}{others})")
    parts += [f"{len(names) - _NAMED} more settings"] if len(names) > _NAMED else []
    rule = "must be the same on all ranks; start all with the same options, settings and packages"
    return f"{', '.join(parts)} {rule}" if names else ""
