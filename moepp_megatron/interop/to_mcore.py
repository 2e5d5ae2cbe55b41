"""Converts a Hugging Face checkpoint to ours, tensor by tensor."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from moepp_megatron.config import Config
from moepp_megatron.data.progress import track
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.file_names import (
    CHAT_TEMPLATE_FILE,
    GENERATION_CONFIG_FILE,
    HF_CONFIG_FILE,
    MODEL_CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from moepp_megatron.interop.checkpoint_tensors import ConvertedCheckpointWriter
from moepp_megatron.interop.convert import free_folder
from moepp_megatron.interop.hf_config import config_from_hf
from moepp_megatron.interop.hf_source import HFSource
from moepp_megatron.interop.tensor_rules import Fields, TensorRule, moepp_rules
from moepp_megatron.interop.zeda import ZEDA, is_zeda, zeda_config
from moepp_megatron.model.megatron_config import DTYPES
from moepp_megatron.runtime.atomic import partial_folder, publish
from moepp_megatron.runtime.terminal import Console

# What models of Hugging Face and checkpoints have under the same names.
_COMPANIONS = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    CHAT_TEMPLATE_FILE,
    GENERATION_CONFIG_FILE,
)


def hf_to_mcore(
    source: Path,
    target: Path,
    dtype: str | None = None,
    allow_pickle: bool = False,
    console: Console | None = None,
) -> Config:
    """Convert a MoE++ checkpoint (released format, ZEDA's or ours) into a checkpoint of ours.

    `target` is made, and must not exist or be empty. `dtype` is fp32 or bf16 for all weights; None
    keeps every tensor as it is. `allow_pickle` also accepts pickled weights.

    Raises:
        ConfigError: If tensors are missing, unexpected or of a wrong shape; names them.
    """
    hf = HFSource(source, allow_pickle)
    config, rules = read_format(hf.config, source.resolve().name, dtype)
    write_checkpoint(hf, rules, config, target, dtype, console)
    return config


def read_format(hf: Fields, name: str, dtype: str | None = None) -> tuple[Config, list[TensorRule]]:
    """Our configuration of a MoE++ model's `config.json`, and its tensors; ConfigError if none."""
    read, rules = (zeda_config, ZEDA.rules) if is_zeda(hf) else (config_from_hf, moepp_rules)
    config = read(hf, name, dtype)
    return config, list(rules(config))


def write_checkpoint(
    hf: HFSource,
    rules: Sequence[TensorRule],
    config: Config,
    target: Path,
    dtype: str | None,
    console: Console | None,
) -> None:
    """Write the checkpoint that `rules` make of a Hugging Face checkpoint.

    ConfigError if a tensor is missing, unexpected or of a wrong shape, or `target` is taken.
    """
    hf.account_for(rules)
    if (hf.folder / TOKENIZER_FILE).is_file():
        # It may be a pointer that Git LFS left.
        Tokenizer.read_backend(hf.folder / TOKENIZER_FILE)
    target = free_folder(target)
    tensors = hf.tensors
    rules = [rule for rule in rules if not rule.unused or tensors.keys() & rule.sources]
    wanted = None if dtype is None else DTYPES[dtype]
    total = sum(tensors[name].nbytes for rule in rules for name in rule.sources)
    with (
        partial_folder(target, "DST") as folder,
        track(console or Console(stderr=True), "converting", total) as advance,
    ):
        writer = ConvertedCheckpointWriter(folder)
        for rule in rules:
            # Steps of a selection bias are far smaller than what bf16 resolves.
            sources = [
                hf.read(name).to(dtype=None if name.endswith("e_score_correction_bias") else wanted)
                for name in rule.sources
            ]
            writer.add(rule.key, rule.pack(sources), rule.shape, rule.index)
            advance(sum(tensors[name].nbytes for name in rule.sources))
        copy_companions(hf.folder, folder)
        # So that the way back gives what this package has no field for.
        shutil.copyfile(hf.folder / MODEL_CONFIG_FILE, folder / HF_CONFIG_FILE)
        writer.complete(config, hf.folder.name)
        publish(folder, target)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what lies beside the weights and says the same in a model and a checkpoint."""
    for name in _COMPANIONS:
        if (source / name).is_file():
            # The checkpoint may be in object storage.
            (target / name).write_bytes((source / name).read_bytes())
