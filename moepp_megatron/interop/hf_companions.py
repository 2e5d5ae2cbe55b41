"""The files beside an exported model's weights: tokenizer, special tokens, model files."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from moepp_megatron.config import Config
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.file_names import (
    CHAT_TEMPLATE_FILE,
    GENERATION_CONFIG_FILE,
    HF_CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from moepp_megatron.interop.hf_source import read_json

_MODEL_FILES = ("configuration_moepp.py", "modeling_moepp.py")
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What models of Hugging Face and checkpoints have under the same names.
_COMPANIONS = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    CHAT_TEMPLATE_FILE,
    GENERATION_CONFIG_FILE,
)


def special_ids(folder: Path) -> dict[str, int | list[int] | None]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id` of a checkpoint's model.

    A model that came from Hugging Face keeps its own. A tokenizer of ours has one special token,
    which ends documents; as in GPT-2 it also begins and pads them. Without a tokenizer
    the ids are None, because transformers would otherwise assume ordinary tokens.
    """
    if (folder / HF_CONFIG_FILE).is_file():
        original = read_json(folder / HF_CONFIG_FILE)
        return {key: original[key] for key in _SPECIAL_IDS if key in original}
    file = folder / TOKENIZER_FILE
    eod = Tokenizer.load(file).eod if file.is_file() else None
    return dict.fromkeys(_SPECIAL_IDS, eod)


def write_companions(source: Path, target: Path, config: Config) -> None:
    """Write the tokenizer and the settings of generation beside an exported model."""
    copy_companions(source, target)
    if (source / TOKENIZER_FILE).is_file():
        write_json(target / TOKENIZER_CONFIG_FILE, _tokenizer_config(source, config))
    if not (source / GENERATION_CONFIG_FILE).is_file():
        known = {key: value for key, value in special_ids(source).items() if value is not None}
        write_json(target / GENERATION_CONFIG_FILE, known)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what lies beside the weights and says the same in a model and a checkpoint."""
    for name in _COMPANIONS:
        if (source / name).is_file():
            # The checkpoint may be in object storage.
            (target / name).write_bytes((source / name).read_bytes())


def _tokenizer_config(source: Path, config: Config) -> dict[str, Any]:
    """The checkpoint's `tokenizer_config.json`, completed by our tokenizers' conventions."""
    file = source / TOKENIZER_CONFIG_FILE
    stated = read_json(file) if file.is_file() else {}
    token = Tokenizer.load(source / TOKENIZER_FILE).eod_token
    assumed = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": token}
    if not (source / HF_CONFIG_FILE).is_file():
        assumed |= {"bos_token": token, "pad_token": token}
    return assumed | {"model_max_length": config.model.seq_length} | stated


def copy_model_files(target: Path) -> None:
    """Copy the files that transformers loads with `trust_remote_code`."""
    package = resources.files("moepp_megatron.interop") / "hf_files"
    for name in _MODEL_FILES:
        (target / name).write_text((package / name).read_text(encoding="utf-8"), encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file in the style of Hugging Face libraries."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
