"""One order of samples over several folders, stage by stage.

megatron-core chooses the folder of each sample (`BlendedDataset`). Each folder has one order of
samples for the whole run, in which a stage continues where the stages before have stopped.
"""

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from torch.utils.data import Dataset

from moepp_megatron.config.blends import Blend
from moepp_megatron.config.errors import ConfigError


@dataclass(frozen=True)
class _Draw:
    """Samples of one stage."""

    blend: Blend
    size: int
    # The sample of a folder's own order that the stage starts from, by its real path.
    firsts: Mapping[str, int]


def plan_draws(blends: Sequence[Blend], num_samples: int) -> tuple[list[_Draw], dict[str, int]]:
    """Return what each stage draws, and the samples each folder must have, by its real path."""
    begun = [blend for blend in blends if blend.first_sample < num_samples] or list(blends[:1])
    ends = [*(blend.first_sample for blend in begun), num_samples]
    needed: dict[str, int] = {}
    draws = []
    for blend, (first, end) in zip(begun, pairwise(ends), strict=True):
        firsts = {folder.real: needed.get(folder.real, 0) for folder in blend.folders}
        draws.append(_Draw(blend, end - first, firsts))
        for folder in blend.folders:
            # `build_blending_indices` never draws more of a folder: it gives each sample to the
            # one that is furthest behind its share, so none is ahead by more than one.
            most = math.ceil(folder.share * (end - first)) + 1
            needed[folder.real] = firsts[folder.real] + most
    return draws, needed


@contextmanager
def cached_in(cache: Path) -> Iterator[None]:
    """Turn failures of megatron-core to write or read its orders of samples into ConfigError."""
    try:
        yield
    except Exception as error:
        # With torch.distributed megatron-core raises a plain Exception from it.
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, OSError):
            raise ConfigError(
                f"data.cache ({cache}) cannot be written ({cause.strerror}); set data.cache to a "
                "folder that can be, and that all ranks see"
            ) from error
        if isinstance(error, ValueError | EOFError):
            raise ConfigError(
                f"data.cache ({cache}) holds a damaged file ({error}); remove this folder: it is "
                "made again"
            ) from error
        raise


class DrawnDataset(Dataset[Any]):
    """The samples of all stages in one order; every rank must make it.

    Args:
        datasets: The open folders by their real paths.
        cache: Folder for the order of a blend.

    Attributes:
        config: megatron-core's configuration of the first folder.
        repeats_from: The sample that follows the last one: the first of the last stage.
    """

    def __init__(
        self, draws: Sequence[_Draw], datasets: Mapping[str, GPTDataset], cache: Path
    ) -> None:
        self._starts = [draw.blend.first_sample for draw in draws]
        self._size = self._starts[-1] + draws[-1].size
        self.repeats_from = self._starts[-1]
        self._datasets = [
            [datasets[folder.real] for folder in draw.blend.folders] for draw in draws
        ]
        self._firsts = [
            [draw.firsts[folder.real] for folder in draw.blend.folders] for draw in draws
        ]
        self._cache = cache.resolve()
        self.config = dataclasses.replace(
            self._datasets[0][0].config, path_to_cache=str(self._cache)
        )
        self.source_names = tuple(getattr(self._datasets[0][0], "source_names", ()))
        self._orders = [
            self._order(draw, each) for draw, each in zip(draws, self._datasets, strict=True)
        ]

    def _order(self, draw: _Draw, datasets: list[GPTDataset]) -> BlendedDataset | None:
        """Map samples to folders; None for one folder. Every rank must call."""
        if len(datasets) == 1:
            return None
        with cached_in(self._cache):
            return BlendedMegatronDatasetBuilder.build_generic_dataset(
                BlendedDataset,
                lambda: True,
                True,  # rank 0 first, the others read what it has written
                datasets,
                [folder.share for folder in draw.blend.folders],
                draw.size,
                self.config,
            )

    def __len__(self) -> int:
        """Samples of all stages."""
        return self._size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """A sample, as its folder has it."""
        dataset, sample = self.locate(index)
        sample_tensors: dict[str, torch.Tensor] = dataset[sample]
        return sample_tensors

    def locate(self, index: int) -> tuple[GPTDataset, int]:
        """The folder that a sample is of, and which of its samples it is."""
        stage = bisect_right(self._starts, index) - 1
        place, order = index - self._starts[stage], self._orders[stage]
        folder = 0 if order is None else int(order.dataset_index[place])
        within = place if order is None else int(order.dataset_sample_index[place])
        return self._datasets[stage][folder], self._firsts[stage][folder] + within
