"""Whether a configuration's data are there and fit its model."""

from __future__ import annotations

from pathlib import Path

from moepp_megatron.config import Config, ConfigError


def check_data(config: Config) -> None:
    """Refuse what training would refuse, before any rank starts.

    Raises:
        ConfigError: `data.path` is no prepared folder, or one with more tokens than the model has,
            or the tokenizer is not the one that it was prepared with.
    """
    from moepp_megatron.data.manifest import Manifest
    from moepp_megatron.data.same_tokenizer import check_corpus_tokenizer

    if config.data.path is None:
        raise ConfigError("data.path (null) must name a prepared folder; see: moepp data prepare")
    path = Path(config.data.path)
    try:
        manifest = Manifest.read(path)
    except (OSError, ValueError):
        raise ConfigError(
            f"data.path ({path}) must be a prepared folder; run: "
            f"moepp data prepare SOURCE... --out {path}"
        ) from None
    if manifest.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size ({config.model.vocab_size}) must hold every token of data.path "
            f"({manifest.vocab_size}); use {manifest.vocab_size} or more"
        )
    check_corpus_tokenizer(config, manifest)
