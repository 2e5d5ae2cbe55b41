"""Folders of Hugging Face datasets: `save_to_disk`, or parquet as the Hub has it.

Other files there are no text, and parts that are meant for tests must not be trained
on by mistake.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.json_file import read_json
from moepp_megatron.file_names import DATASET_DICT_FILE, DATASET_INFO_FILE, DATASET_STATE_FILE

# Such as train-00000-of-00002.parquet, or with a hash after the numbers.
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.parquet")


def companions(source: str, root: Path, names: Sequence[str]) -> set[str]:
    """Find non-data files in folders of Hugging Face datasets below `root`.

    Returns:
        Those of `names` that are to be left out.

    Raises:
        ConfigError: It holds several splits, of which one must be named.
    """
    paths = [PurePosixPath(name) for name in names]
    splits = sorted({split for path in paths for split in _splits(root, path)})
    if len(splits) > 1:
        raise ConfigError(
            f"source {source} holds a dataset of the splits {', '.join(splits)}, and must be one "
            f"of them; name the folder or the files of one, such as those of {splits[-1]}"
        )
    left_out = set()
    by_folder: dict[PurePosixPath, set[str]] = defaultdict(set)
    for path in paths:
        by_folder[path.parent].add(path.name)
        if splits and path.name in ("README.md", DATASET_DICT_FILE):
            left_out.add(str(path))
    for folder, inside in by_folder.items():
        if {DATASET_STATE_FILE, DATASET_INFO_FILE} <= inside:
            data = _data_files(root / folder / DATASET_STATE_FILE)
            if data - inside:
                raise ConfigError(
                    f"source {root / folder} must hold all files that its {DATASET_STATE_FILE} "
                    f"lists, and {min(data - inside)} is missing; copy the dataset again"
                )
            left_out |= {str(folder / name) for name in inside - data} if data else set()
        elif DATASET_INFO_FILE in inside and any(name.endswith(".arrow") for name in inside):
            # All splits, and what `map` has left.
            raise ConfigError(
                f"source {root / folder} must be a dataset that save_to_disk has written, and is a "
                "cache of the package datasets; load it and call save_to_disk, or name one file"
            )
    return left_out


def _splits(root: Path, path: PurePosixPath) -> Iterator[str]:
    """Names of the splits that a saved dictionary has, or a shard of parquet is of."""
    if path.name == DATASET_DICT_FILE:
        content = _read(root / path)
        yield from map(str, content.get("splits", []) if isinstance(content, dict) else [])
    elif (shard := _SHARD.fullmatch(path.name)) is not None:
        yield shard[1]


def _data_files(state: Path) -> set[str]:
    """The data files that `save_to_disk` has listed."""
    content = _read(state)
    listed = content.get("_data_files") if isinstance(content, dict) else None
    return {str(each.get("filename")) for each in listed or [] if isinstance(each, dict)}


def _read(path: Path) -> object:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"source {path} cannot be read ({error}); save the dataset again"
        ) from None
