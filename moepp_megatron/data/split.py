"""The split of a corpus's documents into train, validation and test."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

from moepp_megatron.config import DEFAULT_SPLIT, parse_split
from moepp_megatron.config.blends import Blend, Folder, folders_of
from moepp_megatron.config.errors import ConfigError
from moepp_megatron.data.manifest import Manifest

_ALL_TO_VALIDATION = "0,1,0"
_SPLITS = ("train", "validation", "test")


def check_split(
    split: str | None, manifest: Manifest, validates: bool = True, folder: Folder | None = None
) -> str:
    """Return a split as megatron-core reads it, or raise ConfigError.

    It must have three weights and leave no wanted part without a document: megatron-core would loop
    for ever over such a part.

    Args:
        split: value of `data.split`; None takes the corpus's own, or else `DEFAULT_SPLIT`.
        validates: whether the validation part is read. If not, it may have no document; its weight
            then goes to the training part, whose documents that does not change.
        folder: the corpus's folder, for messages.
    """
    if split is None:
        split = DEFAULT_SPLIT if manifest.split is None else manifest.split
    weights = parse_split(split)
    if weights is None or sum(weights) == 0:
        raise ConfigError(
            f"data.split ({split}) must be three weights for train, validation and test; use 98,2,0"
        )
    plain = _plain(weights)
    ranges = document_ranges(plain, manifest.documents)
    if not validates and ranges[0] is not None and _is_empty(ranges[1]):
        plain = _plain((weights[0] + weights[1], 0.0, weights[2]))
        ranges = document_ranges(plain, manifest.documents)
    for name, bounds in zip(_SPLITS, ranges, strict=True):
        if _is_empty(bounds):
            raise ConfigError(
                f"data.split ({split}) gives {name} none of the {manifest.documents} documents"
                f"{'' if folder is None else f' of {folder}'}; "
                "give it more weight, or 0, or prepare the text as more files or records"
            )
    return plain


def split_of_set(folder: Folder, trained: Sequence[Blend], split: str | None) -> str | None:
    """The split of a folder that `data.validation` names: all of one that is not trained on."""
    return split if folder.real in folders_of(trained) else _ALL_TO_VALIDATION


def check_set(
    folder: Folder, trained: Sequence[Blend], split: str | None, corpus: Manifest
) -> None:
    """Raise ConfigError for a folder of `data.validation` with nothing to validate on."""
    plain = check_split(split_of_set(folder, trained, split), corpus, folder=folder)
    if document_ranges(plain, corpus.documents)[1] is None:
        raise ConfigError(
            f"{folder} is trained on, and must leave something to validate on "
            f"in data.split ({plain}); use data.split=98,2,0, or another folder"
        )


def _plain(weights: Iterable[float]) -> str:
    """Plain decimals, because megatron-core would read "1e2" as the two numbers 1 and 2."""
    return ",".join(f"{weight:.9f}" for weight in weights)


def _is_empty(bounds: tuple[int, int] | None) -> bool:
    """True if a part has a weight and no document."""
    return bounds is not None and bounds[0] == bounds[1]


def document_ranges(split: str, documents: int) -> list[tuple[int, int] | None]:
    """Return each part's first document and last document + 1; None where its weight is 0."""
    # Rounded like megatron-core (BlendedMegatronDatasetBuilder._build_megatron_dataset_splits),
    # whose import takes seconds.
    weights = [float(weight) for weight in split.split(",")]
    total = sum(weights)
    bounds = pairwise(accumulate((weight / total for weight in weights), initial=0.0))
    return [
        None if end <= start else (round(start * documents), round(end * documents))
        for start, end in bounds
    ]
