"""Opens a prepared folder as megatron-core GPT datasets: train, validation, test."""

from collections.abc import Callable
from pathlib import Path

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.data.document_sources import SourcedDataset, read_document_sources
from moepp_megatron.data.manifest import CACHE, CORPUS, Manifest
from moepp_megatron.data.split import check_split
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.data.verify import check_start, read_manifest

Datasets = tuple[GPTDataset | None, GPTDataset | None, GPTDataset | None]


def build_datasets(
    data_path: Path,
    tokenizer: Tokenizer,
    sequence_length: int,
    split: str | None,
    seed: int,
    num_samples: tuple[int, int, int],
    *,
    reset_position_ids: bool = False,
    reset_attention_mask: bool = False,
    eod_mask_loss: bool = False,
    cache_dir: Path | None = None,
) -> Datasets:
    """Open a prepared folder. With torch.distributed every rank must call this.

    A sample is `sequence_length` consecutive tokens of the shuffled documents, each of which ends
    with EOD, and the same shifted by one as labels. A split too small for its number of samples
    is repeated, reshuffled. Rank 0 computes the sample indices, the others wait and read them,
    so all ranks must see the same `cache_dir`.

    Args:
        data_path: folder written by `moepp data prepare`.
        tokenizer: the folder's, or one with the same ids.
        sequence_length: tokens of a sample.
        split: weights of train, validation and test by documents, such as "98,2,0"; None takes
            the corpus's own, or `DEFAULT_SPLIT` if it has none.
        seed: Seed of the order of samples.
        num_samples: how many samples each split must have at least. With 0 of validation that part
            may have no document.
        reset_position_ids: positions start at 0 after every EOD.
        reset_attention_mask: no attention across EOD. Only then a sample has an `attention_mask`,
            bool [1, s, s], True where attention is forbidden: it is large.
        eod_mask_loss: no loss where the input is EOD.
        cache_dir: folder of the sample indices; by default `data_path/cache`.

    Returns:
        Train, validation and test; None for one whose weight is 0, or that is not read and empty.
        Where the folder says which data source each document comes from, they are
        `SourcedDataset`s.

    Raises:
        ConfigError: no dataset there, another tokenizer, or a split that cannot be made.
    """
    manifest = read_manifest(data_path, "data.path")
    check_start(data_path, manifest, whole_index=False)
    _check_tokenizer(tokenizer, manifest, data_path)
    if sequence_length < 1:
        raise ConfigError(f"model.seq_length ({sequence_length}) must be at least 1; use 2048")
    plain_split = check_split(split, manifest, validates=num_samples[1] > 0)
    # By content, so that a cache outside the folder survives a replaced dataset.
    cache = (cache_dir or data_path / CACHE) / manifest.identity[:16]
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=([str((data_path / CORPUS).resolve())], None),
        split=plain_split,
        path_to_cache=str(cache.resolve()),
        tokenizer=tokenizer,
        reset_position_ids=reset_position_ids,
        reset_attention_mask=reset_attention_mask,
        eod_mask_loss=eod_mask_loss,
        create_attention_mask=reset_attention_mask,
    )
    sources = read_document_sources(data_path, manifest)
    kind = GPTDataset if sources is None else SourcedDataset
    builder = BlendedMegatronDatasetBuilder(
        kind, list(num_samples), is_built_on_rank=lambda: True, config=config
    )
    train, validation, test = builder.build()
    for dataset in (train, validation, test):
        if isinstance(dataset, SourcedDataset):
            dataset.source_names, dataset.document_sources = manifest.source_names, sources
    return train, validation, test


def _shuffled_documents(
    config: Config, tokenizer: Tokenizer, num_samples: tuple[int, int, int]
) -> Datasets:
    assert config.data.path is not None, "training needs data.path"
    data, seed = config.data, config.training.seed
    length = config.model.seq_length
    return build_datasets(config.data.path, tokenizer, length, data.split, seed, num_samples)


# What `data.dataset` may name: from the configuration, the run's tokenizer and the numbers of
# samples that training, validation and test want at least. Every rank calls it.
DATASETS: dict[str, Callable[[Config, Tokenizer, tuple[int, int, int]], Datasets]] = {
    "gpt": _shuffled_documents
}


def _check_tokenizer(tokenizer: Tokenizer, manifest: Manifest, data_path: Path) -> None:
    there = (manifest.vocab_size, manifest.eod_id)
    if (tokenizer.vocab_size, tokenizer.eod) != there:
        raise ConfigError(
            f"data.tokenizer ({tokenizer.vocab_size} tokens, EOD {tokenizer.eod}) must be the one "
            f"data.path ({data_path}) was prepared with ({there[0]} tokens, EOD {there[1]}); "
            "leave data.tokenizer out"
        )
