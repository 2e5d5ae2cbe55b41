"""Converts a checkpoint of ours to a Hugging Face checkpoint, tensor by tensor."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moepp_megatron.config import Config, ConfigError, load_config, parse_config
from moepp_megatron.data.progress import track
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.file_names import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    HF_CONFIG_FILE,
    MODEL_CONFIG_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from moepp_megatron.interop.checkpoint_tensors import TensorReader
from moepp_megatron.interop.convert import free_folder
from moepp_megatron.interop.expressible import Row, refuse_settings
from moepp_megatron.interop.hf_config import OWN, RELEASED, refuse_uncomputed
from moepp_megatron.interop.hf_source import read_json, write_tensors
from moepp_megatron.interop.model_card import (
    TRAINING_CONFIG_FILE,
    UNKNOWN_LICENSE,
    model_card,
)
from moepp_megatron.interop.tensor_rules import UNUSED_PREFIX, Fields, TensorRule
from moepp_megatron.interop.to_mcore import copy_companions
from moepp_megatron.interop.vanilla import VANILLA
from moepp_megatron.interop.zeda import ZEDA
from moepp_megatron.model.megatron_config import DTYPES
from moepp_megatron.runtime.atomic import partial_folder, publish
from moepp_megatron.runtime.terminal import Console
from moepp_megatron.training.checkpoint.find import find_checkpoint, newest_again

_DEFAULT_SHARD_BYTES = 5 * 1000**3
# What a checkpoint holds next to the model's weights.
_NOT_EXPORTED = ("optimizer", "mtp.", UNUSED_PREFIX)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NOT_LATENT: tuple[Row, ...] = (("model.latent_attention", (None,), "no layout has it"),)
_LATENT_REMEDY = "score and generate from the checkpoint itself"


_FORMATS = {"moepp": OWN, "released": RELEASED, "vanilla": VANILLA, "zeda": ZEDA}


@newest_again
def mcore_to_hf(
    source: Path,
    target: Path,
    layout: str = "moepp",
    max_shard_bytes: int = _DEFAULT_SHARD_BYTES,
    console: Console | None = None,
    dtype: str | None = None,
    license_id: str = UNKNOWN_LICENSE,
    original: Path | None = None,
) -> list[str]:
    """Convert a checkpoint of ours into a folder that transformers loads; returns warnings.

    Args:
        source: A checkpoint folder or a run.
        target: Folder to make; it must not exist or be empty.
        layout: `moepp` for our configuration and class names, `released` for the released ones,
            `zeda` for ZEDA's Qwen3-MoE, `vanilla` for DeepSeek-MoE, Mixtral or Qwen3-MoE.
        max_shard_bytes: Largest shard.
        console: Console that shows the progress.
        dtype: fp32 or bf16 for all weights but selection biases; None keeps each tensor's own.
        license_id: Licence of the weights, by the Hub's identifier; for the model card.
        original: A checkpoint made from a Hugging Face model, whose context length, special tokens,
            chat template and settings of generation the export has; None for those of `source`.

    Raises:
        ConfigError: If the layout cannot express the model, or the checkpoint is damaged.
    """
    form = _FORMATS[layout]
    _check_license(license_id)
    folder = find_checkpoint(source)
    trained = load_config(folder / CONFIG_FILE)
    config = _without_further_tokens(trained)
    refuse_settings(config, _NOT_LATENT, "an export", _LATENT_REMEDY)
    if form.classes is not None:
        refuse_uncomputed(config)
    fields, companions = form.fields(config), original or folder
    if original is not None:
        fields["max_position_embeddings"] = load_config(original / CONFIG_FILE).model.seq_length
    reader = TensorReader(folder)
    rules = _present_rules(reader, list(form.rules(config)), form.keeps_unused)
    target = free_folder(target)
    command = ["moepp", "convert", "mcore-to-hf", source.resolve().name, target.name]
    command += ["--layout", layout, *([] if dtype is None else ["--dtype", dtype])]
    command += [] if original is None else ["--original", original.name]
    with partial_folder(target, "DST") as unfinished:
        written = _write_weights(reader, rules, unfinished, max_shard_bytes, console, dtype)
        name = str(written).removeprefix("torch.")
        fields |= _special_ids(companions) | {form.dtype_field: name} | _auto_map(form.classes)
        _write_json(unfinished / MODEL_CONFIG_FILE, fields)
        for each in dict.fromkeys((folder, companions)):
            _write_companions(each, unfinished, config)
        card = model_card(folder, unfinished, config, shlex.join(command), license_id)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        (unfinished / TRAINING_CONFIG_FILE).write_bytes((folder / CONFIG_FILE).read_bytes())
        if form.classes is not None:
            # What transformers loads with `trust_remote_code`.
            for name in ("configuration_moepp.py", "modeling_moepp.py"):
                shutil.copyfile(Path(__file__).parent / "hf_files" / name, unfinished / name)
        publish(unfinished, target)
    warnings = list(form.warnings(config))
    if depths := trained.model.mtp_num_layers:
        warnings.append(f"model.mtp_num_layers ({depths}): the export leaves these layers out")
    if config.moe.capacity_factor is not None:
        warnings.append("moe.capacity_factor is not exported: the model there drops no selection")
    return warnings


def _check_license(license_id: str) -> None:
    """Refuse a text that is not an identifier of a licence; ConfigError if it is not one."""
    if not _LICENSE.fullmatch(license_id):
        raise ConfigError(
            f"--license ({license_id}) must be an identifier of the Hub in small letters, such as "
            "apache-2.0; name one, or leave it out"
        )


def _without_further_tokens(config: Config) -> Config:
    """The model without the layers of multi-token prediction, which only serve training."""
    if config.model.mtp_num_layers == 0:
        return config
    content = config.model_dump(mode="json", exclude_unset=True)
    for name in ("mtp_num_layers", "mtp_loss_scaling_factor"):
        content["model"].pop(name, None)
    return parse_config(content)


def _present_rules(
    reader: TensorReader, rules: Sequence[TensorRule], keeps_unused: bool
) -> list[TensorRule]:
    """The rules of tensors that are written; ConfigError for a missing or unread tensor."""
    tensors = reader.tensors
    for rule in rules:
        if rule.unused:
            continue
        shape = tensors[rule.key][1] if rule.key in tensors else None
        if shape != rule.shape:
            found = "does not hold it" if shape is None else f"holds {list(shape)}"
            raise ConfigError(
                f"{reader.folder}: tensor {rule.key} must have shape {list(rule.shape)} by "
                f"{CONFIG_FILE}, and the checkpoint {found}; copy the checkpoint again"
            )
    read = {rule.key for rule in rules}
    left = [key for key in tensors if key not in read and not key.startswith(_NOT_EXPORTED)]
    if left:
        raise ConfigError(
            f"{reader.folder}: tensor {left[0]} has no place in this layout, and the export would "
            "compute something else without it; export in another --layout, or teach "
            f"moepp_megatron/interop its tensors ({len(left)} in all)"
        )
    return [rule for rule in rules if not rule.unused or keeps_unused or rule.key in tensors]


def _write_weights(
    reader: TensorReader,
    rules: Sequence[TensorRule],
    folder: Path,
    max_shard_bytes: int,
    console: Console | None,
    dtype: str | None,
) -> torch.dtype:
    """Write the tensors into shards, selection biases in their dtype; returns the embedding's."""
    dtypes = {
        key: stored if dtype is None or key.endswith(".expert_bias") else DTYPES[dtype]
        for key, (stored, _) in reader.tensors.items()
    }
    main_dtype = dtypes["embedding.word_embeddings.weight"]
    plan = [
        (name, dtypes.get(rule.key, main_dtype), shape)
        for rule in rules
        for name, shape in rule.sources.items()
    ]
    total = sum(to.itemsize * torch.Size(shape).numel() for _, to, shape in plan)
    with track(console or Console(stderr=True), "converting", total) as advance:

        def produced() -> Iterator[Tensor]:
            for rule in rules:
                assert rule.unpack is not None, f"{rule.key} cannot be converted back"
                if rule.key in dtypes:
                    tensor = reader.read(rule.key, rule.index).to(dtypes[rule.key])
                else:
                    assert rule.key.startswith(UNUSED_PREFIX), rule.key
                    tensor = torch.zeros(rule.slice_shape, dtype=main_dtype)
                for part in rule.unpack(tensor):
                    yield part
                    advance(part.nbytes)

        write_tensors(folder, plan, produced(), max_shard_bytes)
    return main_dtype


def _auto_map(classes: tuple[str, str] | None) -> Fields:
    """Fields that tell transformers which of our classes to load."""
    if classes is None:
        return {}
    config_class, model_class = classes
    return {
        "architectures": [model_class],
        "auto_map": {
            "AutoConfig": f"configuration_moepp.{config_class}",
            # vLLM's Transformers backend asks for it.
            "AutoModel": f"modeling_moepp.{model_class.replace('ForCausalLM', 'Model')}",
            "AutoModelForCausalLM": f"modeling_moepp.{model_class}",
        },
    }


def _special_ids(folder: Path) -> dict[str, int | list[int] | None]:
    """Read the ids of special tokens: the original model's own, or our tokenizer's one for all."""
    if (folder / HF_CONFIG_FILE).is_file():
        original = read_json(folder / HF_CONFIG_FILE)
        return {key: original[key] for key in _SPECIAL_IDS if key in original}
    file = folder / TOKENIZER_FILE
    eod = Tokenizer.load(file).eod if file.is_file() else None
    # As in GPT-2. None without a tokenizer: transformers would otherwise assume ordinary tokens.
    return dict.fromkeys(_SPECIAL_IDS, eod)


def _write_companions(source: Path, target: Path, config: Config) -> None:
    """Write the tokenizer and the settings of generation beside an exported model."""
    copy_companions(source, target)
    if (source / TOKENIZER_FILE).is_file():
        _write_json(target / TOKENIZER_CONFIG_FILE, _tokenizer_config(source, config))
    if not (source / GENERATION_CONFIG_FILE).is_file():
        known = {key: value for key, value in _special_ids(source).items() if value is not None}
        _write_json(target / GENERATION_CONFIG_FILE, known)


def _tokenizer_config(source: Path, config: Config) -> Fields:
    """The checkpoint's `tokenizer_config.json`, completed by our tokenizers' conventions."""
    file = source / TOKENIZER_CONFIG_FILE
    stated = read_json(file) if file.is_file() else {}
    token = Tokenizer.load(source / TOKENIZER_FILE).eod_token
    assumed = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": token}
    if not (source / HF_CONFIG_FILE).is_file():
        assumed |= {"bos_token": token, "pad_token": token}
    return assumed | {"model_max_length": config.model.seq_length} | stated


def _write_json(path: Path, content: Fields) -> None:
    """Write a JSON file in the style of Hugging Face libraries."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
