"""Folders of Hugging Face datasets: `save_to_disk`, or parquet as the Hub has it.

What lies beside the data there is no text, and parts that are meant for tests must not be trained
on by mistake.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.json_file import read_json
from moepp_megatron.data.source_files import SourceFile

_DICT, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"
# Such as train-00000-of-00002.parquet, or with a hash behind the numbers.
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.parquet")


def without_companions(source: str, root: Path, files: Sequence[SourceFile]) -> list[SourceFile]:
    """Leave out what is not data in the folders of Hugging Face's datasets below `root`.

    Args:
        source: The source, for messages.
        root: The folder that is read.
        files: What is in it.

    Raises:
        ConfigError: It holds several splits, of which one must be named.
    """
    by_folder: dict[PurePosixPath, list[SourceFile]] = defaultdict(list)
    for file in files:
        by_folder[PurePosixPath(file.name).parent].append(file)
    splits = sorted(set(_splits(files)))
    if len(splits) > 1:
        names = ", ".join(splits)
        raise ConfigError(
            f"source {source} holds a dataset of the splits {names}, and must be one of them; name "
            f"the folder or the files of one, such as those of {splits[-1]}"
        )
    has_shards = bool(splits)
    return [
        file
        for folder in by_folder
        for file in _data_of(root / folder, by_folder[folder])
        if not (has_shards and file.path.name in ("README.md", _DICT))
    ]


def _splits(files: Sequence[SourceFile]) -> Iterator[str]:
    """Names of the splits that saved dictionaries and shards of parquet are of."""
    for file in files:
        if file.path.name == _DICT:
            content = _read(file.path)
            yield from map(str, content.get("splits", []) if isinstance(content, dict) else [])
        elif (shard := _SHARD.fullmatch(file.path.name)) is not None:
            yield shard[1]


def _data_of(folder: Path, files: list[SourceFile]) -> list[SourceFile]:
    """The data files of one folder that `save_to_disk` has written, or all of another's."""
    names = {file.path.name for file in files}
    if not {_STATE, _INFO} <= names:
        return files
    content = _read(folder / _STATE)
    listed = content.get("_data_files") if isinstance(content, dict) else None
    data = {each.get("filename") for each in listed or [] if isinstance(each, dict)}
    return [file for file in files if file.path.name in data] if data else files


def _read(path: Path) -> object:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"source {path} cannot be read ({error}); save the dataset again"
        ) from None
