"""Converts a Hugging Face checkpoint to ours, tensor by tensor."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.data.progress import track
from moepp_megatron.data.tokenizer import check_tokenizer_file
from moepp_megatron.file_names import (
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
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
from moepp_megatron.interop.moepp_rules import moepp_rules
from moepp_megatron.interop.tensor_rules import TensorRule, linear_modules
from moepp_megatron.interop.zeda import ZEDA, is_zeda, zeda_config
from moepp_megatron.runtime.atomic import partial_folder, publish
from moepp_megatron.runtime.terminal import Console

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MAX_LISTED = 5
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

    Args:
        source: A Hugging Face folder.
        target: Folder to make; it must not exist or be empty.
        dtype: fp32 or bf16 for all weights; None keeps every tensor as it is.
        allow_pickle: Also accept pickled weights.
        console: Console that shows the progress.

    Raises:
        ConfigError: If tensors are missing, unexpected or of a wrong shape; names them.
    """
    hf = HFSource(source, allow_pickle)
    config, rules = read_format(hf.config, source.resolve().name, dtype)
    write_checkpoint(hf, rules, config, target, dtype, console)
    return config


def read_format(
    hf: Mapping[str, Any], name: str, dtype: str | None = None
) -> tuple[Config, list[TensorRule]]:
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
    account_for(hf, rules)
    if (hf.folder / TOKENIZER_FILE).is_file():
        # It may be a pointer that Git LFS left.
        check_tokenizer_file(hf.folder / TOKENIZER_FILE)
    target = free_folder(target)
    tensors = hf.tensors
    rules = [rule for rule in rules if not rule.unused or tensors.keys() & rule.sources]
    wanted = None if dtype is None else TORCH_DTYPES[dtype]
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
        complete(writer, folder, config, hf.folder.name)
        publish(folder, target)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what lies beside the weights and says the same in a model and a checkpoint."""
    for name in _COMPANIONS:
        if (source / name).is_file():
            # The checkpoint may be in object storage.
            (target / name).write_bytes((source / name).read_bytes())


def account_for(hf: HFSource, rules: Sequence[TensorRule]) -> None:
    """Refuse (ConfigError) a checkpoint that does not hold exactly what the rules read."""
    tensors = hf.tensors
    wanted = {name: shape for rule in rules for name, shape in rule.sources.items()}
    optional = {name for rule in rules if rule.unused for name in rule.sources}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    problems = differences(wanted, found, "config.json", optional)
    for rule in rules:
        dtypes = {tensors[name].dtype for name in rule.sources if name in tensors}
        if len(dtypes) > 1:
            names = ", ".join(rule.sources)
            problems.append(f"tensors {names} must have one dtype; use --dtype fp32 or bf16")
    if problems:
        raise ConfigError("\n".join(f"{hf.folder}: {problem}" for problem in problems))


def differences(
    wanted: Mapping[str, Any], found: Mapping[str, Any], by: str, optional: Iterable[str] = ()
) -> list[str]:
    """List how tensors, by name and shape, differ from those wanted `by` a file."""
    return [
        *_problems_of("is missing", sorted(wanted.keys() - found.keys() - set(optional))),
        *_problems_of("is unexpected", sorted(found.keys() - wanted.keys())),
        *(
            f"tensor {name} must have shape {list(shape)} by {by} and has {list(found[name])}"
            for name, shape in sorted(wanted.items())
            if found.get(name, shape) != shape
        ),
    ]


def _problems_of(what: str, names: Sequence[str]) -> list[str]:
    lines = [f"tensor {name} {what}" for name in names[:_MAX_LISTED]]
    if len(names) > _MAX_LISTED:
        lines.append(f"and {len(names) - _MAX_LISTED} more tensors: each {what}")
    return lines


def complete(writer: ConvertedCheckpointWriter, folder: Path, config: Config, origin: str) -> None:
    """Write what makes a checkpoint of ours of a folder with all else in it, tensors included."""
    write_objects(writer, config)
    text = config.to_yaml(f"converted from {origin}")
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    writer.finish()
    writer.finish_manifest()


def write_objects(
    writer: ConvertedCheckpointWriter, config: Config, common: Mapping[str, Any] | None = None
) -> None:
    """Write the objects, besides tensors, that megatron-core requires in every checkpoint.

    `common` is state that is not sharded; None for none.
    """
    for module, count in linear_modules(config):
        for part in range(count):
            writer.add_object(f"{module}._extra_state", None, part, count)
    # No optimizer, schedule or progress: training starts those anew (training/checkpoint.py).
    writer.add_object("common_state", dict(common or {}))
