"""Opens prepared folders as megatron-core GPT datasets: train, validation, test."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.config.blends import Blend, Folder, blends_of, folders_of, labels
from moepp_megatron.data.blending import DrawnDataset, cached_in, plan_draws
from moepp_megatron.data.manifest import CACHE, MARKS, MAX_SOURCES, Manifest
from moepp_megatron.data.prepared_data import check_sequence_length
from moepp_megatron.data.samples import ConversationDataset, SourcedDataset, read_document_sources
from moepp_megatron.data.split import check_split, split_of_set
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.data.verify import check_start, read_manifest

# Each a GPTDataset, a DrawnDataset or None.
Datasets = tuple[Any, Any, Any]
Samples = tuple[int, int, int]
# Folder, within a cache, of which folder each sample of a blend is of.
_ORDERS = "blends"


def build_datasets(
    data: Path | Sequence[Blend],
    tokenizer: Tokenizer,
    sequence_length: int,
    split: str | None,
    seed: int,
    num_samples: Samples,
    *,
    reset_position_ids: bool = False,
    eod_mask_loss: bool = False,
    cache_dir: Path | None = None,
) -> Datasets:
    """Open prepared folders. With torch.distributed every rank must call this.

    A sample is `sequence_length` consecutive tokens of the shuffled documents, each of which ends
    with EOD, and the same shifted by one as labels; in a folder of conversations it is whole
    conversations (`ConversationDataset`). A split too small for its number of samples is repeated,
    reshuffled. Rank 0 computes the sample indices, the others wait and read them, so all ranks must
    see the same `cache_dir`.

    Args:
        data: a folder written by `moepp data prepare`, or the blends of a run.
        tokenizer: the folder's, or one with the same ids.
        sequence_length: tokens of a sample.
        split: weights of train, validation and test by documents, such as "98,2,0"; None takes the
            corpus's own, or `DEFAULT_SPLIT` if it has none.
        seed: decides the order of samples.
        num_samples: how many samples each split must have at least. With 0 of validation that part
            may have no document.
        reset_position_ids: positions start at 0 after every EOD.
        eod_mask_loss: no loss where the input is EOD.
        cache_dir: folder of the sample indices; by default `cache` in the (first) data folder.

    Returns:
        Train, validation and test; None for one whose weight is 0, or that is not read and empty.
        Of several folders, validation is the blend of the first stage, and there is no test. Where
        folders are several, or one says which data source each document comes from, samples say
        theirs (`SourcedDataset`).

    Raises:
        ConfigError: no dataset there, another tokenizer, or a split that cannot be made.
    """
    if sequence_length < 1:
        raise ConfigError(f"model.seq_length ({sequence_length}) must be at least 1; use 2048")
    options = _options(tokenizer, sequence_length, seed, reset_position_ids, eod_mask_loss)
    if isinstance(data, Path):
        data = [Blend("data.path", 0, (Folder("data.path", data),))]
    opener = _Opener(options, split, cache_dir)
    if len(data) == 1 and len(data[0].folders) == 1:
        return opener.open(data[0].folders[0], num_samples)
    return _open_blends(data, opener, num_samples)


def build_validation_sets(
    config: Config, tokenizer: Tokenizer, num_samples: int
) -> dict[str, GPTDataset]:
    """Open the sets of `data.validation` by name; none if `num_samples` is 0. Every rank must call.

    A folder that is trained on gives its validation part, any other all of its documents. Each set
    has at least `num_samples` samples. Raises ConfigError if one has no dataset or no document.
    """
    data = config.data
    options = _options(
        tokenizer,
        config.model.seq_length,
        config.training.seed,
        data.reset_position_ids,
        data.eod_mask_loss,
    )
    datasets, trained = {}, blends_of(config)
    for name, path in data.validation.items() if num_samples else ():
        folder = Folder(f"data.validation.{name}", path)
        split = split_of_set(folder, trained, data.split)
        opener = _Opener(options, split, data.cache)
        _, datasets[name], _ = opener.open(folder, (0, num_samples, 0), with_sources=False)
    return datasets


def _options(
    tokenizer: Tokenizer, sequence_length: int, seed: int, resets_positions: bool, masks_eod: bool
) -> dict[str, Any]:
    """Return `GPTDatasetConfig` options that all folders of a run share."""
    return {
        "random_seed": seed,
        "sequence_length": sequence_length,
        "tokenizer": tokenizer,
        "reset_position_ids": resets_positions,
        "eod_mask_loss": masks_eod,
    }


def _open_blends(blends: Sequence[Blend], opener: "_Opener", num_samples: Samples) -> Datasets:
    draws, needed = plan_draws(blends, num_samples[0])
    validated, to_validate = plan_draws(blends[:1], num_samples[1])
    validating = to_validate if num_samples[1] else {}
    folders = [folder for real, folder in folders_of(blends).items() if real in needed]
    with_sources = len(folders) <= MAX_SOURCES
    opened = {
        folder.real: opener.open(
            folder, (needed[folder.real], validating.get(folder.real, 0), 0), with_sources
        )
        for folder in folders
    }
    if with_sources:
        _place_sources(labels([folder.path for folder in folders]), list(opened.values()))
    cache = opener.cache(folders[0]) / _ORDERS
    train = DrawnDataset(draws, {real: parts[0] for real, parts in opened.items()}, cache)
    validations = {folder.real: opened[folder.real][1] for folder in blends[0].folders}
    if num_samples[1] == 0 or None in validations.values():
        return train, None, None
    return train, DrawnDataset(validated, validations, cache), None


def _place_sources(names: Sequence[str], opened: Sequence[Any]) -> None:
    """Count the sources of all folders: each is one, or has its own, with its name before them."""
    is_detailed = sum(len(_own_sources(parts)) for parts in opened) <= MAX_SOURCES
    all_names: list[str] = []
    for name, parts in zip(names, opened, strict=True):
        first, own = len(all_names), _own_sources(parts) if is_detailed else ("",)
        all_names += [f"{name}/{each}" if each else name for each in own]
        for dataset in (each for each in parts if each is not None):
            dataset.first_source = first
            if own == ("",):
                dataset.document_sources = None
    for dataset in (each for parts in opened for each in parts if each is not None):
        dataset.source_names = tuple(all_names)


def _own_sources(parts: Sequence[Any]) -> tuple[str, ...]:
    """Names of a folder's sources; one without a name where it distinguishes none."""
    return ("",) if parts[0].document_sources is None else parts[0].source_names


@dataclass(frozen=True)
class _Opener:
    """Opens single folders."""

    options: Mapping[str, Any]
    split: str | None
    cache_dir: Path | None

    def open(
        self, folder: Folder, num_samples: Samples, with_sources: bool | None = None
    ) -> Datasets:
        """Train, validation and test of one folder."""
        manifest = read_manifest(folder)
        check_start(folder, manifest)
        _check_tokenizer(self.options["tokenizer"], manifest, folder)
        plain_split = check_split(self.split, manifest, num_samples[1] > 0, folder)
        check_sequence_length(self.options["sequence_length"], manifest, folder)
        # By content, so that a cache outside the folder survives a replaced dataset.
        cache = (self.cache(folder) / manifest.identity[:16]).resolve()
        config = GPTDatasetConfig(
            # Masks are made on the device, from the documents (`model.document_attention`).
            reset_attention_mask=False,
            create_attention_mask=False,
            add_extra_token_to_sequence=manifest.chat is None,
            blend=([str(manifest.prefix(folder.path).resolve())], None),
            split=plain_split,
            path_to_cache=str(cache),
            **self.options,
        )
        sources = None if with_sources is False else read_document_sources(folder, manifest)
        if with_sources is None:
            with_sources = sources is not None
        kind = SourcedDataset if with_sources else GPTDataset
        if manifest.chat is not None:
            kind = ConversationDataset
        builder = BlendedMegatronDatasetBuilder(
            kind, list(num_samples), is_built_on_rank=lambda: True, config=config
        )
        with cached_in(cache):
            train, validation, test = builder.build()
        for dataset in (each for each in (train, validation, test) if each is not None):
            dataset.setting = folder  # for `check_tokens`
            if isinstance(dataset, SourcedDataset):
                dataset.source_names, dataset.document_sources = manifest.source_names, sources
            elif isinstance(dataset, ConversationDataset):
                dataset.marks = IndexedDataset(str((folder.path / MARKS).resolve()))
        return train, validation, test

    def cache(self, folder: Folder) -> Path:
        """The folder of the sample indices."""
        path = folder.path
        return self.cache_dir or (path if path.is_dir() else path.parent) / CACHE


def _shuffled_documents(config: Config, tokenizer: Tokenizer, num_samples: Samples) -> Datasets:
    data = config.data
    return build_datasets(
        blends_of(config),
        tokenizer,
        config.model.seq_length,
        data.split,
        config.training.seed,
        num_samples,
        reset_position_ids=data.reset_position_ids,
        eod_mask_loss=data.eod_mask_loss,
        cache_dir=data.cache,
    )


# What `data.dataset` may name: from the configuration, the run's tokenizer and the numbers of
# samples that training, validation and test want at least. Every rank calls it.
DATASETS: dict[str, Callable[[Config, Tokenizer, Samples], Datasets]] = {"gpt": _shuffled_documents}


def _check_tokenizer(tokenizer: Tokenizer, manifest: Manifest, folder: Folder) -> None:
    there = (manifest.vocab_size, manifest.eod_id)
    if not manifest.is_bare and (tokenizer.vocab_size, tokenizer.eod) != there:
        raise ConfigError(
            f"data.tokenizer ({tokenizer.vocab_size} tokens, EOD {tokenizer.eod}) must be the one "
            f"{folder} was prepared with ({there[0]} tokens, EOD "
            f"{there[1]}); leave data.tokenizer out"
        )
