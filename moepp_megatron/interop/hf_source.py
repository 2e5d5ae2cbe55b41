"""A Hugging Face checkpoint folder: its configuration, and its tensors by name."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepp_megatron.config import ConfigError, json_file
from moepp_megatron.config.paths import looked_at
from moepp_megatron.file_names import MODEL_CONFIG_FILE, PICKLES_INDEX_FILE, SAFETENSORS_INDEX_FILE
from moepp_megatron.interop.safetensors_file import TensorEntry, read_header, read_tensor


class HFSource:
    """The tensors of a checkpoint folder, all files checked, none read.

    The folder holds `config.json` and `model.safetensors`, or shards with an index.
    `allow_pickle` also accepts `pytorch_model.bin`, read with `weights_only`.

    Raises:
        ConfigError: If a file is missing, truncated, or contradicts the index.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False) -> None:
        self.folder = folder
        self.config = read_json(folder / MODEL_CONFIG_FILE)
        self._entries: dict[str, TensorEntry] = {}
        self._pickled: dict[str, Tensor] = {}
        index = folder / SAFETENSORS_INDEX_FILE
        if index.is_file():
            self._open_shards(index)
        elif (folder / "model.safetensors").is_file():
            self._entries = read_header(folder / "model.safetensors")
        else:
            self._open_pickles(allow_pickle)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the folder by name, without its data."""
        stored: dict[str, TensorEntry | Tensor] = {**self._entries, **self._pickled}
        return {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            for name, tensor in stored.items()
        }

    def leave_out(self, names: Iterable[str]) -> None:
        """Forget tensors, as if the folder did not have them."""
        for name in names:
            self._entries.pop(name, None)
            self._pickled.pop(name, None)

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        if name in self._entries:
            return read_tensor(self._entries[name])
        return self._pickled[name]

    def _open_shards(self, index: Path) -> None:
        content = read_json(index)
        weight_map = _weight_map(index, content)
        for file in sorted(set(weight_map.values())):
            path = _within(self.folder, index, file)
            for name, entry in read_header(path).items():
                if weight_map.get(name) != file:
                    raise ConfigError(
                        f"{index} places tensor {name} in {weight_map.get(name)}, but it is in "
                        f"{file}; fetch the index and the shards of one checkpoint"
                    )
                self._entries[name] = entry
        missing = sorted(weight_map.keys() - self._entries.keys())
        if missing:
            raise ConfigError(
                f"{self.folder / weight_map[missing[0]]} must hold tensor {missing[0]} by "
                f"{index.name} and does not; fetch the index and the shards of one checkpoint"
            )
        stated = (content.get("metadata") or {}).get("total_size")
        total = sum(entry.num_bytes for entry in self._entries.values())
        if stated is not None and stated != total:
            raise ConfigError(
                f"{index}: metadata.total_size ({stated}) must be the shards' sum ({total}); fetch "
                "the checkpoint again, or remove total_size if you trust the shards"
            )

    def _open_pickles(self, allow_pickle: bool) -> None:
        index = self.folder / PICKLES_INDEX_FILE
        files = [self.folder / "pytorch_model.bin"]
        if index.is_file():
            names = sorted(set(_weight_map(index, read_json(index)).values()))
            files = [_within(self.folder, index, name) for name in names]
        if not all(file.is_file() for file in files):
            raise ConfigError(
                f"{self.folder} must hold model.safetensors, or shards with "
                "model.safetensors.index.json; name a checkpoint folder"
            )
        if not allow_pickle:
            raise ConfigError(
                f"{files[0]} holds pickled weights, which can run code when they are read; "
                "use safetensors, or --allow-pickle if you trust the source"
            )
        for file in files:
            try:
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:
                reason = str(error).splitlines()[0]
                raise ConfigError(f"{file} cannot be read as plain weights: {reason}") from None
            for name, tensor in loaded.items():
                if not torch.is_tensor(tensor) or name in self._pickled:
                    raise ConfigError(f"{file} must hold tensors only, each once; {name} is not")
                self._pickled[name] = tensor


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ConfigError if it cannot be read or is not an object."""
    try:
        content = json_file.read_json(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}){looked_at(path)}; name the folder "
            "of a Hugging Face model"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} must be JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a JSON object; fetch it again")
    return content


def _weight_map(index: Path, content: dict[str, Any]) -> dict[str, str]:
    weight_map = content.get("weight_map")
    valid = isinstance(weight_map, dict) and all(isinstance(f, str) for f in weight_map.values())
    if not valid or not weight_map:
        raise ConfigError(f"{index} must have a weight_map from tensors to files; fetch it again")
    return dict(weight_map)


def _within(folder: Path, index: Path, name: str) -> Path:
    """A shard's path; names that leave the folder are refused."""
    if name != Path(name).name or name in ("", ".", ".."):
        raise ConfigError(f"{index} must name files of its own folder, not {name!r}")
    return folder / name
