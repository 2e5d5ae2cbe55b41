"""The files beside an exported model's weights: tokenizer, special tokens, model files."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from moepp_megatron.config import Config
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.interop.hf_source import read_json
from moepp_megatron.interop.to_mcore import HF_CONFIG_FILE
from moepp_megatron.training.checkpoint import TOKENIZER_FILE

_MODEL_FILES = ("configuration_moepp.py", "modeling_moepp.py")
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_COPIED = (TOKENIZER_FILE, "special_tokens_map.json", "chat_template.jinja")
_TOKENIZER_CONFIG = "tokenizer_config.json"
_GENERATION_CONFIG = "generation_config.json"


def special_ids(folder: Path) -> dict[str, int | list[int] | None]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id` of a checkpoint's model.

    A model that came from Hugging Face keeps its own. A tokenizer of ours has one special token,
    which ends documents; as in GPT-2 it also begins and pads them. Without a tokenizer
    the ids are None, because transformers would otherwise assume ordinary tokens.
    """
    if (folder / HF_CONFIG_FILE).is_file():
        original = read_json(folder / HF_CONFIG_FILE)
        return {key: original[key] for key in _SPECIAL_IDS if key in original}
    eod = None
    if (folder / TOKENIZER_FILE).is_file():
        eod = Tokenizer.load(folder / TOKENIZER_FILE).eod
    return dict.fromkeys(_SPECIAL_IDS, eod)


def write_companions(source: Path, target: Path, config: Config) -> None:
    """Write the tokenizer and the settings of generation beside an exported model.

    Args:
        source: The checkpoint.
        target: The exported folder.
        config: The checkpoint's configuration.
    """
    for name in _COPIED:
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())
    if (source / TOKENIZER_FILE).is_file():
        write_json(target / _TOKENIZER_CONFIG, _tokenizer_config(source, config))
    elif (source / _TOKENIZER_CONFIG).is_file():
        content = (source / _TOKENIZER_CONFIG).read_bytes()
        (target / _TOKENIZER_CONFIG).write_bytes(content)
    if (source / _GENERATION_CONFIG).is_file():
        content = (source / _GENERATION_CONFIG).read_bytes()
        (target / _GENERATION_CONFIG).write_bytes(content)
    else:
        known = {key: value for key, value in special_ids(source).items() if value is not None}
        write_json(target / _GENERATION_CONFIG, known)


def _tokenizer_config(source: Path, config: Config) -> dict[str, Any]:
    """The checkpoint's `tokenizer_config.json`, completed by our tokenizers' conventions."""
    file = source / _TOKENIZER_CONFIG
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
