"""torch's flight recorder: collectives that a rank has begun and not completed."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# A few steps of a large model; about half a kilobyte each.
_ENTRIES = "2000"
_PREFIX = "trace_rank_"


def enable(dump_folder: Path) -> None:
    """Switch the recorder on, before the process group exists; the user's settings win.

    Args:
        dump_folder: Where NCCL's own watchdog writes its dump when a collective times out.
    """
    defaults = {
        "TORCH_FR_BUFFER_SIZE": ("TORCH_NCCL_TRACE_BUFFER_SIZE", _ENTRIES),
        "TORCH_FR_DUMP_ON_TIMEOUT": ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
        "TORCH_FR_DUMP_TEMP_FILE": ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(dump_folder / _PREFIX)),
    }
    for name, (older_name, value) in defaults.items():
        if older_name not in os.environ:
            os.environ.setdefault(name, value)


def dump(folder: Path, rank: int) -> None:
    """Write this rank's records: JSON for `pending_collectives`, a pickle for torch's own tool.

    That is `python -m torch.distributed.flight_recorder.fr_trace FOLDER -p trace_rank_`.
    """
    import torch.distributed as dist
    from torch._C import _distributed_c10d

    # Typed as far as this build goes: one without NCCL lacks its functions, an older torch gloo's.
    c10d: Any = _distributed_c10d
    try:
        if dist.get_backend() == "nccl":
            as_json, as_pickle = c10d._dump_nccl_trace_json(), c10d._dump_nccl_trace()
        else:
            as_json, as_pickle = c10d._dump_fr_trace_json(), c10d._dump_fr_trace()
        (folder / f"{_PREFIX}{rank}").write_bytes(as_pickle)
        _json_file(folder, rank).write_bytes(
            as_json if isinstance(as_json, bytes) else as_json.encode()
        )
    except (AttributeError, OSError, RuntimeError) as error:
        logger.warning("no flight record of rank %d: %s", rank, error)


def pending_collectives(folder: Path, world_size: int) -> dict[int, str]:
    """For each rank with a dump that shows one: its oldest collective without an end."""
    pending = {}
    for rank in range(world_size):
        try:
            record = json.loads(_json_file(folder, rank).read_bytes())
        except (OSError, ValueError):
            continue
        described = _pending(record)
        if described is not None:
            pending[rank] = described
    return pending


def _pending(record: dict[str, Any]) -> str | None:
    """Describe the oldest entry that its group has enqueued and not completed."""
    status = record.get("pg_status", {})
    for entry in sorted(record.get("entries", []), key=lambda entry: entry["record_id"]):
        if entry.get("is_p2p") or entry.get("state") == "completed":
            continue
        group = status.get(str(entry["pg_id"]), {})
        if entry["collective_seq_id"] > int(group.get("last_completed_collective", 1 << 62)):
            name, description = entry["process_group"][:2]
            return (
                f"{entry['profiling_name']} number {entry['collective_seq_id']} "
                f"of group {description or name}, sizes {entry['input_sizes']}"
            )
    return None


def _json_file(folder: Path, rank: int) -> Path:
    return folder / f"collectives_rank_{rank}.json"
