"""Contents of prepared data and a run's draw from them: `moepp data show`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.config.blends import Folder, blends_of
from moepp_megatron.data.index import CorpusError, read_ends, read_header
from moepp_megatron.data.manifest import Manifest
from moepp_megatron.data.split import check_split, document_ranges
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.data.verify import check_start, damaged, read_manifest


class Corpus:
    """A prepared folder or a pair of .bin and .idx; raises ConfigError if absent or damaged."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self.manifest: Manifest = read_manifest(folder)
        check_start(folder, self.manifest)
        prefix = self.manifest.prefix(folder.path)
        self._bin = Path(f"{prefix}.bin")
        idx, is_ours = Path(f"{prefix}.idx"), not self.manifest.is_bare
        try:
            self._header = read_header(idx, self.manifest.documents if is_ours else None)
            ends = read_ends(idx, self._header, self._bin.stat().st_size, is_ours)
        except (CorpusError, OSError) as error:
            raise damaged(folder, str(error)) from None
        # [documents + 1] int64, the first token of each, and the number of all.
        self._starts = np.append(np.int64(0), ends)

    def document(self, number: int) -> NDArray[np.integer]:
        """Return a document's token ids by its number; raise ConfigError if there is none."""
        last = self.manifest.documents - 1
        if not 0 <= number <= last:
            raise ConfigError(f"--document ({number}) must be from 0 to {last}; use 0")
        data = np.memmap(self._bin, dtype=self._header.dtype, mode="r")
        return np.asarray(data[self._starts[number] : self._starts[number + 1]])

    def training_tokens(self, split: str | None) -> int:
        """Count the tokens that are trained on; raise ConfigError if the split cannot be made."""
        plain = check_split(split, self.manifest, validates=False, folder=self._folder)
        part = document_ranges(plain, self.manifest.documents)[0]
        if part is None:
            return 0
        first, end = part
        return int(self._starts[end] - self._starts[first])


def shown_text(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return ids as text; raise ConfigError if one is outside of the tokenizer's vocabulary."""
    highest = max(tokens, default=0)
    if highest >= tokenizer.vocab_size:
        raise ConfigError(
            f"--tokenizer has {tokenizer.vocab_size} tokens and must hold every id (a document has "
            f"{highest}); name the tokenizer that the ids were made with"
        )
    return tokenizer.decode(list(tokens))


@dataclass(frozen=True)
class _Share:
    """A run's tokens from one folder, in one stage or in all, and epochs of it."""

    path: Path
    share: float
    tokens: float
    epochs: float


@dataclass(frozen=True)
class StageShares:
    """One stage of a run, or all of it."""

    name: str
    first_step: int
    last_step: int
    shares: tuple[_Share, ...]


def planned_shares(config: Config, corpora: dict[str, Corpus], end: int) -> list[StageShares]:
    """Plan each stage's shares, then the whole run's, of `end` samples.

    `corpora` are the folders by their real paths. Where not every step reads
    `training.global_batch_size` samples, the run has one stage.
    """
    training, length = config.training, config.model.seq_length
    batch = training.global_batch_size
    blends = [blend for blend in blends_of(config) if blend.first_sample < end]
    own = {real: each.training_tokens(config.data.split) for real, each in corpora.items()}
    drawn: dict[str, float] = {}
    paths: dict[str, Path] = {}
    stages = []
    firsts = [blend.first_sample for blend in blends]
    steps = pairwise([*(first // batch for first in firsts), training.train_iters])
    for blend, (first, behind), (step, last_step) in zip(
        blends, pairwise([*firsts, end]), steps, strict=True
    ):
        shares = []
        for folder in blend.folders:
            tokens = folder.share * (behind - first) * length
            drawn[folder.real] = drawn.get(folder.real, 0.0) + tokens
            paths.setdefault(folder.real, folder.path)
            epochs = tokens / max(own[folder.real], 1)
            shares.append(_Share(folder.path, folder.share, tokens, epochs))
        stages.append(StageShares(blend.name, step, last_step, tuple(shares)))
    whole = tuple(
        _Share(paths[real], tokens / (end * length), tokens, tokens / max(own[real], 1))
        for real, tokens in drawn.items()
    )
    return [*stages, StageShares("the run", 0, training.train_iters, whole)]
