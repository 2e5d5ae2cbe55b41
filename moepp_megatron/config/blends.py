"""The folders that a run draws its samples from, and from where on."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moepp_megatron.config.schema import BlendPart, Config, DataSection
    from moepp_megatron.features.data_stages.settings import DataStage


@dataclass(frozen=True)
class Folder:
    """One folder of a blend: the setting that names it, and its share of the samples, above 0."""

    name: str
    path: Path
    share: float = 1.0

    def __str__(self) -> str:
        """The setting with the path, as messages name it."""
        return f"{self.name} ({self.path})"

    @property
    def real(self) -> str:
        """Its path without links: two spellings of it are one folder."""
        return os.path.realpath(self.path)


@dataclass(frozen=True)
class Blend:
    """The data mixture of a run after its first `first_sample` samples, counted over all ranks.

    `name` is the setting that describes it; each folder with a share is in `folders` once.
    """

    name: str
    first_sample: int
    folders: tuple[Folder, ...]

    @property
    def text(self) -> str:
        """Folders and shares in words."""
        if len(self.folders) == 1:
            return str(self.folders[0].path)
        return ", ".join(f"{folder.share:.1%} {folder.path}" for folder in self.folders)


def blends_of(config: Config) -> tuple[Blend, ...]:
    """The blends of a run in order, the first from sample 0 on; none where no data are named."""
    data, batch = config.data, config.training.global_batch_size
    blends = []
    if data.path is not None:
        blends.append(Blend("data.path", 0, (Folder("data.path", data.path),)))
    elif data.blend:
        blends.append(Blend("data.blend", 0, _folders("data.blend", data.blend)))
    for index, stage in enumerate(data.stages):
        name = f"data.stages[{index}]"
        first = first_step(config, stage) * batch
        blends.append(Blend(name, first, _folders(f"{name}.blend", stage.blend)))
    return tuple(blends)


def first_step(config: Config, stage: DataStage) -> int:
    """Steps that the run has taken when a stage begins; 0 for one that does not say."""
    if stage.from_step is not None:
        return stage.from_step
    tokens_per_step = config.training.global_batch_size * config.model.seq_length
    return math.ceil((stage.from_tokens or 0) / tokens_per_step)


def blend_at(blends: Sequence[Blend], consumed_samples: int) -> Blend:
    """The blend that the sample after `consumed_samples` is drawn from."""
    return blends[bisect_right([blend.first_sample for blend in blends], consumed_samples) - 1]


def folders_of(blends: Sequence[Blend]) -> dict[str, Folder]:
    """Each folder once, by its real path, as the first blend that has it names it."""
    folders: dict[str, Folder] = {}
    for blend in blends:
        for folder in blend.folders:
            folders.setdefault(folder.real, folder)
    return folders


def labels(paths: Sequence[Path]) -> list[str]:
    """Short names of folders: the last part of the path, or all of it where that is not enough."""
    names = [path.name for path in paths]
    return [
        name if name and names.count(name) == 1 else str(path)
        for name, path in zip(names, paths, strict=True)
    ]


def with_whole_paths(data: DataSection) -> DataSection:
    """A copy for a file in another folder, from which relative paths would lead elsewhere."""

    def whole(parts: Sequence[BlendPart]) -> list[BlendPart]:
        return [part.model_copy(update={"path": part.path.resolve()}) for part in parts]

    single = {key: getattr(data, key) for key in ("path", "tokenizer", "cache")}
    return data.model_copy(
        update={
            **{key: path and path.resolve() for key, path in single.items()},
            "blend": whole(data.blend),
            "stages": [s.model_copy(update={"blend": whole(s.blend)}) for s in data.stages],
            "validation": {name: path.resolve() for name, path in data.validation.items()},
        }
    )


def _folders(name: str, parts: Sequence[BlendPart]) -> tuple[Folder, ...]:
    total = math.fsum(part.weight for part in parts)
    return tuple(
        Folder(f"{name}[{index}].path", part.path, part.weight / total)
        for index, part in enumerate(parts)
        if part.weight > 0
    )
