"""From a checkpoint of ours to a Hugging Face checkpoint, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from moepp_megatron.config import Config, ConfigError, load_config
from moepp_megatron.config.json_file import read_json
from moepp_megatron.config.problem import show
from moepp_megatron.data.atomic import partial_folder, publish
from moepp_megatron.data.progress import track
from moepp_megatron.interop.checkpoint_reader import CheckpointReader
from moepp_megatron.interop.hf_config import own_hf_config, released_hf_config, released_warnings
from moepp_megatron.interop.moepp_rules import UNUSED_PREFIX, moepp_rules
from moepp_megatron.interop.rules import Rule
from moepp_megatron.interop.safetensors_file import SafetensorsWriter
from moepp_megatron.interop.to_mcore import HF_CONFIG_FILE, free_folder
from moepp_megatron.interop.zero_expert_formats import (
    longcat_hf_config,
    longcat_warnings,
    qwen3_moe_rules,
    zeda_hf_config,
)
from moepp_megatron.runtime.terminal import Console
from moepp_megatron.training.checkpoint import CONFIG_FILE, TOKENIZER_FILE, find_checkpoint

DEFAULT_SHARD_BYTES = 5 * 1000**3
_MODEL_FILES = ("configuration_moepp.py", "modeling_moepp.py")
_AUTO_MAPS = {
    "moepp": ("MoEPPConfig", "MoEPPForCausalLM"),
    "released": ("MoeConfig", "MoeForCausalLM"),
    "longcat": ("MoEPPConfig", "MoEPPForCausalLM"),
}
_HF_CONFIGS = {
    "moepp": own_hf_config,
    "released": released_hf_config,
    "longcat": longcat_hf_config,
    "zeda": zeda_hf_config,
}
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# Of the source's config.json: what this package has no field for.
_KEPT_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_COMPANIONS = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)


def mcore_to_hf(
    source: Path,
    target: Path,
    layout: str = "moepp",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    console: Console | None = None,
) -> list[str]:
    """Convert a checkpoint of ours into a folder that transformers loads.

    Args:
        source: A checkpoint folder or a run.
        target: Folder to make; it must not exist or be empty.
        layout: `moepp` for our configuration and class names, `released` for the released ones,
            `longcat` or `zeda` for the fields of those models (`zero_expert_formats`).
        max_shard_bytes: Largest shard.
        console: Where progress goes.

    Returns:
        Warnings for the user.

    Raises:
        ConfigError: For a model that the layout cannot express, or a damaged checkpoint.
    """
    folder = find_checkpoint(source)
    config = load_config(folder / CONFIG_FILE)
    _refuse_latent_attention(config)
    fields = _HF_CONFIGS[layout](config)
    reader = CheckpointReader(folder)
    names = qwen3_moe_rules if layout == "zeda" else moepp_rules
    rules = present_rules(reader, list(names(config)), layout)
    target = free_folder(target)
    with partial_folder(target) as partial:
        dtype = write_weights(reader, rules, partial, max_shard_bytes, console)
        fields |= _kept_fields(folder) | auto_map(layout, dtype)
        write_json(partial / "config.json", fields)
        copy_companions(folder, partial)
        if layout in _AUTO_MAPS:
            _copy_model_files(partial)
        publish(partial, target)
    return list(_warnings(config, layout))


def _refuse_latent_attention(config: Config) -> None:
    """The attention of every format here is Llama's.

    Raises:
        ConfigError: The model has another one.
    """
    if config.model.latent_attention is not None:
        raise ConfigError(
            f"model.latent_attention ({show(config.model.latent_attention.model_dump())}) must be "
            "null for an export: no layout here has multi-head latent attention; score or "
            "generate from the checkpoint itself"
        )


def present_rules(reader: CheckpointReader, rules: Sequence[Rule], layout: str) -> list[Rule]:
    """The rules whose tensors are written: unused ones where kept, or where the format wants them.

    Raises:
        ConfigError: Naming a tensor that the checkpoint lacks or holds in another shape.
    """
    tensors = reader.tensors
    for rule in rules:
        if rule.unused:
            continue
        shape = tensors[rule.key][1] if rule.key in tensors else None
        if shape != rule.shape:
            held = "does not hold it" if shape is None else f"holds {list(shape)}"
            raise ConfigError(
                f"{reader.folder}: tensor {rule.key} must have shape {list(rule.shape)} by "
                f"{CONFIG_FILE}, and the checkpoint {held}; copy the checkpoint again"
            )
    return [
        rule for rule in rules if not rule.unused or layout == "released" or rule.key in tensors
    ]


def write_weights(
    reader: CheckpointReader,
    rules: Sequence[Rule],
    folder: Path,
    max_shard_bytes: int,
    console: Console | None,
) -> torch.dtype:
    """Write the tensors into safetensors shards; returns the embedding's dtype."""
    tensors = reader.tensors
    main_dtype = tensors["embedding.word_embeddings.weight"][0]
    dtypes = {key: dtype for key, (dtype, _) in tensors.items()}
    plan = [
        (source.name, dtypes.get(rule.key, main_dtype), source.shape)
        for rule in rules
        for source in rule.sources
    ]
    total = sum(dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in plan)
    with (
        SafetensorsWriter(folder, plan, max_shard_bytes) as writer,
        track(console or Console(stderr=True), "converting", total) as advance,
    ):
        for rule in rules:
            assert rule.unpack is not None, f"{rule.key} cannot be converted back"
            if rule.key in tensors:
                tensor = reader.read(rule.key, rule.index)
            else:
                assert rule.key.startswith(UNUSED_PREFIX), rule.key
                tensor = torch.zeros(rule.slice_shape, dtype=main_dtype)
            for source, part in zip(rule.sources, rule.unpack(tensor), strict=True):
                writer.write(source.name, part)
            advance(tensor.nbytes)
    return main_dtype


def auto_map(layout: str, dtype: torch.dtype) -> dict[str, Any]:
    """Fields that tell transformers which classes to load, and in which dtype."""
    fields: dict[str, Any] = {"torch_dtype": _DTYPE_NAMES.get(dtype, "float32")}
    if layout in _AUTO_MAPS:
        config_class, model_class = _AUTO_MAPS[layout]
        fields["architectures"] = [model_class]
        fields["auto_map"] = {
            "AutoConfig": f"configuration_moepp.{config_class}",
            "AutoModelForCausalLM": f"modeling_moepp.{model_class}",
        }
    return fields


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as Hugging Face libraries do."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer and what belongs to it, where the checkpoint has them."""
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / TOKENIZER_FILE).is_file() and not (target / "tokenizer_config.json").exists():
        from moepp_megatron.data.tokenizer import Tokenizer

        token = Tokenizer.load(source / TOKENIZER_FILE).eod_token
        content = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": token}
        write_json(target / "tokenizer_config.json", content)


def _warnings(config: Config, layout: str) -> Iterator[str]:
    if layout == "longcat":
        yield from longcat_warnings(config)
    if layout == "released":
        yield from released_warnings(config)
    if config.moe.capacity_factor is not None:
        yield "moe.capacity_factor is not exported: the model in transformers drops no selection"


def _kept_fields(folder: Path) -> dict[str, Any]:
    file = folder / HF_CONFIG_FILE
    if file.is_file():
        original = read_json(file)
        return {key: original[key] for key in _KEPT_FIELDS if key in original}
    if (folder / TOKENIZER_FILE).is_file():
        from moepp_megatron.data.tokenizer import Tokenizer

        return {"eos_token_id": Tokenizer.load(folder / TOKENIZER_FILE).eod}
    return {}


def _copy_model_files(target: Path) -> None:
    package = resources.files("moepp_megatron.interop") / "hf_files"
    for name in _MODEL_FILES:
        (target / name).write_text((package / name).read_text(encoding="utf-8"), encoding="utf-8")
