"""Whether a configuration's data are there and fit its model."""

from __future__ import annotations

from pathlib import Path

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.data.manifest import Manifest

# From this share of a token's FLOPs on, rows of the output layer without a token are worth a word.
_WASTED_SHARE = 0.05
# Model sizes are multiples of it: of what GPUs multiply well, and of tensor parallel sizes.
_VOCAB_MULTIPLE = 128


def check_data(config: Config, whole_index: bool = True) -> list[str]:
    """Refuse what training would refuse, before any rank starts.

    Args:
        config: A checked configuration.
        whole_index: Read the corpus's index, 20 bytes per document, and not its header alone. One
            process per run is enough.

    Returns:
        Warnings.

    Raises:
        ConfigError: If `data.path` is no prepared folder, one that is damaged, one with more tokens
            than the model has, or one with too few documents for the split, or the tokenizer is
            not the one that it was prepared with.
    """
    from moepp_megatron.data.same_tokenizer import check_corpus_tokenizer
    from moepp_megatron.data.split import check_split
    from moepp_megatron.data.verify import check_start, read_manifest

    if config.data.path is None:
        raise ConfigError("data.path (null) must name a prepared folder; see: moepp data prepare")
    path = Path(config.data.path)
    manifest = read_manifest(path, "data.path")
    check_start(path, manifest, whole_index)
    check_split(config.data.split, manifest, validates=config.training.eval_iters > 0)
    if manifest.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size ({config.model.vocab_size}) must hold every token of data.path "
            f"({manifest.vocab_size}); use {manifest.vocab_size} or more"
        )
    check_corpus_tokenizer(config, manifest)
    if manifest.chat is not None:
        _check_chat(config, manifest, path)
    return _wasted_vocabulary(config, manifest.vocab_size)


def check_sequence_length(sequence_length: int, manifest: Manifest, path: Path) -> None:
    """Refuse another length of sequences than conversations were put into.

    Raises:
        ConfigError: Naming both.
    """
    if manifest.chat is not None and manifest.chat.sequence_length != sequence_length:
        raise ConfigError(
            f"model.seq_length ({sequence_length}) must be the --seq-length that data.path "
            f"({path}) was prepared with ({manifest.chat.sequence_length}), whose sequences hold "
            "whole conversations; use the same, or prepare it again"
        )


def _check_chat(config: Config, manifest: Manifest, path: Path) -> None:
    """Refuse settings with which conversations would be trained on in another way than prepared."""
    check_sequence_length(config.model.seq_length, manifest, path)
    name, of = "data.path", f"({path}), which holds conversations"
    if not config.data.reset_attention_mask:
        raise ConfigError(
            f"data.reset_attention_mask (false) must be true with {name} {of}, several in a "
            "sequence, which must not see each other; set it to true"
        )
    if config.data.eod_mask_loss:
        raise ConfigError(
            f"data.eod_mask_loss (true) must be false with {name} {of} and says itself which "
            "tokens have loss; leave it out"
        )
    if config.moe.is_vanilla:
        _check_vanilla_padding(config, f"for vanilla layers with {name} {of} and padding")


def _check_vanilla_padding(config: Config, when: str) -> None:
    """Refuse what megatron-core's own router does not compute over tokens without padding."""
    moe, parallel = config.moe, config.parallel
    if moe.capacity_factor is not None:
        raise ConfigError(
            f"moe.capacity_factor ({moe.capacity_factor}) must be null {when}: megatron-core lets "
            "padding take experts' places; leave it out, or add zero-computation experts"
        )
    for key in ("tensor_model_parallel_size", "context_parallel_size"):
        size = getattr(parallel, key)
        if size > 1 and moe.balance_coeff > 0:
            raise ConfigError(
                f"parallel.{key} ({size}) must be 1 {when}: megatron-core weighs the balance loss "
                "on each rank by that rank's own tokens, of which padding leaves them unequal "
                "numbers; use 1, moe.balance_coeff 0, or zero-computation experts"
            )


def _wasted_vocabulary(config: Config, tokens: int) -> list[str]:
    """A warning where much of the output layer is for tokens that the tokenizer does not have."""
    from moepp_megatron.config.flops import forward_flops_per_token
    from moepp_megatron.config.parameters import count_parameters

    model = config.model
    rows = model.vocab_size - tokens
    flops = forward_flops_per_token(config, config.moe.ffn_share)
    share = 2 * model.hidden_size * rows / flops
    if share < _WASTED_SHARE:
        return []
    parameters = rows * model.hidden_size * (1 if model.tie_embeddings else 2)
    enough = -(-tokens // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    return [
        f"model.vocab_size ({model.vocab_size}) is far larger than the vocabulary of data.path "
        f"({tokens}): {parameters / 1e6:,.1f} of {count_parameters(config).total / 1e6:,.1f} M "
        f"parameters and {share:.0%} of the FLOPs of a token are for tokens that do not exist; "
        f"set model.vocab_size={enough}, or prepare the data with --vocab-size "
        f"{model.vocab_size} or a --tokenizer of that size"
    ]
