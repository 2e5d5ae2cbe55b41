"""Converts a checkpoint of ours to one that Megatron-LM's own loop loads with `--load`.

It is what Megatron calls a release: only weights, from which a run starts at iteration 0. The loop
takes the model from its command line, so the arguments that describe it are written next to it.
"""

import shutil
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

from moepp_megatron.config import Config, ConfigError, load_config
from moepp_megatron.config.megatron_flags import ALWAYS, SETTINGS
from moepp_megatron.file_names import CONFIG_FILE, TOKENIZER_FILE
from moepp_megatron.interop.checkpoint_tensors import ConvertedCheckpointWriter, TensorReader
from moepp_megatron.interop.convert import free_folder
from moepp_megatron.interop.expressible import Row, refuse_settings
from moepp_megatron.interop.from_megatron_lm import RELEASE, TRACKER_FILE
from moepp_megatron.interop.megatron_arguments import OWN_SETTINGS, option
from moepp_megatron.layer_settings import BALANCE_TYPES
from moepp_megatron.runtime.atomic import partial_folder, publish
from moepp_megatron.runtime.object_store import ObjectPath
from moepp_megatron.training.checkpoint.find import find_checkpoint, newest_again

ARGUMENTS_FILE = "arguments.txt"
_PREFIX = "__release"
# Arguments with a value, in the order in which they are written.
_NAMES = (
    "num-layers hidden-size ffn-hidden-size num-attention-heads kv-channels seq-length "
    "max-position-embeddings padded-vocab-size position-embedding-type rotary-base normalization "
    "norm-epsilon init-method-std attention-dropout hidden-dropout num-experts "
    "moe-ffn-hidden-size moe-layer-freq moe-shared-expert-intermediate-size moe-router-topk "
    "moe-router-score-function moe-router-topk-scaling-factor moe-router-bias-update-rate "
    "moe-router-num-groups moe-router-group-topk moe-router-load-balancing-type "
    "moe-aux-loss-coeff moe-z-loss-coeff moe-input-jitter-eps"
)
_RULES: tuple[Row, ...] = (
    ("model.latent_attention", (None,), "MoE++ has no multi-latent attention there"),
    ("model.mtp_num_layers", (0,), "multi-token prediction gets no router logits there"),
    ("moe.constants_shared", (False,), "it is this package's model's"),
    ("model.qkv_bias", (False,), "the way back refuses --add-qkv-bias"),
    ("moe.shared_expert_gate", (False,), "the way back refuses --moe-shared-expert-gate"),
    ("model.qk_layernorm_scope", ("head",), "--qk-layernorm normalises each head by itself"),
)


@newest_again
def to_megatron_lm(source: Path, target: Path) -> str:
    """Make a `--load` folder of Megatron-LM; returns Megatron's arguments of the model.

    Args:
        source: A checkpoint's folder, or a run's, which means its newest.
        target: Folder to make; it must not exist or be empty. Data files become hard links, or
            copies where the file system has none.

    Raises:
        ConfigError: If Megatron-LM's loop cannot build the model, the checkpoint cannot be read or
            lacks a tensor, or the folder cannot be written.
    """
    folder = find_checkpoint(source)
    if isinstance(folder, ObjectPath):
        raise ConfigError(
            f"SRC ({folder}) must be a folder of this machine, for links to its files; copy it here"
        )
    config = load_config(folder / CONFIG_FILE)
    arguments = " ".join(_megatron_arguments(config))
    reader = TensorReader(folder)
    names = reader.weight_names(config)
    target = free_folder(target)
    with partial_folder(target, "DST") as partial:
        release = partial / RELEASE
        release.mkdir()
        writer = ConvertedCheckpointWriter(release, _PREFIX)
        writer.adopt(reader, names)
        # 3.0: how queries, keys and values lie in one matrix.
        writer.add_objects(config, common={"checkpoint_version": 3.0, "iteration": 0})
        writer.finish()
        (partial / TRACKER_FILE).write_text(RELEASE, encoding="utf-8")
        (partial / ARGUMENTS_FILE).write_text(f"{arguments}\n", encoding="utf-8")
        if (folder / TOKENIZER_FILE).is_file():
            shutil.copyfile(folder / TOKENIZER_FILE, partial / TOKENIZER_FILE)
        publish(partial, target)
    return arguments


def _megatron_arguments(config: Config) -> list[str]:
    """The arguments of Megatron-LM's command line for a model; ConfigError without such."""
    whole = float(int(config.model.rotary_base))
    rows: list[Row] = [*_RULES, ("model.rotary_base", (whole,), "--rotary-base is a whole number")]
    refuse_settings(config, rows, "Megatron-LM's loop", "train on with `moepp train`")
    return [word for option in _options(config) for word in option]


def _options(config: Config) -> Iterator[list[str]]:
    model, moe = config.model, config.moe
    pattern = [int(is_moe) for is_moe in moe.moe_layer_pattern(model.num_layers)]
    balance = BALANCE_TYPES[moe.balance_scope] if moe.balance_coeff > 0 else "none"
    derived: dict[str, Any] = {
        **ALWAYS,
        "kv-channels": model.head_dim,
        "max-position-embeddings": model.seq_length,
        "rotary-base": int(model.rotary_base),
        "moe-ffn-hidden-size": config.expert_ffn_hidden_size,
        "moe-layer-freq": 1 if all(pattern) else f"[{','.join(map(str, pattern))}]",
        "moe-router-topk-scaling-factor": None if moe.gate_scale == 1.0 else moe.gate_scale,
        "moe-router-bias-update-rate": moe.bias_update_rate or None,
        "moe-router-num-groups": moe.num_groups if moe.limits_groups else None,
        "moe-router-group-topk": moe.group_topk if moe.limits_groups else None,
        "moe-router-load-balancing-type": balance,
        "moe-aux-loss-coeff": moe.balance_coeff,
    }
    values = {
        name: derived[name] if name in derived else attrgetter(SETTINGS[name])(config)
        for name in _NAMES.split()
    }
    moepp_values = {option(name).removeprefix("--"): getattr(moe, name) for name in OWN_SETTINGS}
    values |= {name: value for name, value in moepp_values.items() if not isinstance(value, bool)}
    yield from ([f"--{name}", str(value)] for name, value in values.items() if value is not None)
    groups = model.query_groups
    if groups != model.num_attention_heads:
        yield ["--group-query-attention", "--num-query-groups", str(groups)]
    flags = {
        "swiglu": True,
        "disable-bias-linear": True,
        "untie-embeddings-and-output-weights": not model.tie_embeddings,
        "qk-layernorm": model.qk_layernorm,
        "bf16": config.precision.dtype == "bf16",
        # Top-1 routing demands it; without MoE++ experts megatron-core's own router reads it.
        "moe-router-pre-softmax": moe.router_topk == 1
        or (moe.is_vanilla and moe.gate_normalization == "none"),
        "moe-router-enable-expert-bias": moe.bias_update_rate > 0
        or (moe.is_vanilla and moe.selection_bias),
        "moepp-no-gating-residual": not moe.gating_residual,
        **{name: value for name, value in moepp_values.items() if isinstance(value, bool)},
    }
    yield from ([f"--{name}"] for name, is_set in flags.items() if is_set)
