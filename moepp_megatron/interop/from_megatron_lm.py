"""Converts a checkpoint of Megatron-LM's own training loop to ours without copying tensors.

Both have megatron-core's distributed format with the same names of tensors. Only the index, which
lists only the weights, the configuration and the checksums are new. Optimizer, random
states and pickled objects of the other loop are not entered into the index, so nothing of them is
ever unpickled.

    SAVE/latest_checkpointed_iteration.txt    the number of the newest, or `release`
    SAVE/iter_0000100/                        megatron-core's distributed format
    SAVE/release/                             weights only

The run's arguments are a pickled `argparse.Namespace` among other objects. They are read without
importing, calling or building anything that the file names: every class that it asks for becomes an
empty stand-in.
"""

import io
import pickle
import shutil
import zipfile
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.file_names import FORMAT_FILE, TOKENIZER_FILE
from moepp_megatron.interop.checkpoint_tensors import ConvertedCheckpointWriter, TensorReader
from moepp_megatron.interop.convert import free_folder
from moepp_megatron.interop.hf_config import assemble
from moepp_megatron.interop.megatron_arguments import environment_arguments, moepp_config
from moepp_megatron.interop.tensor_rules import Fields
from moepp_megatron.layer_settings import DECLARED
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.runtime.atomic import partial_folder, publish

# How data files of ours begin that stand beside data files of another writer.
_PREFIX = "__converted"
# Megatron's arguments that the decoder here has one value of, and what to call those that are not
# named as on the command line.
_FIXED: dict[str, Any] = {
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "no_rope_freq": None,
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "swiglu": True,
    "activation_func_clamp_value": None,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "attention_output_gate": False,
    "softmax_type": "vanilla",
    "window_size": None,
    "use_mup": False,
    "fp16": False,
    "moe_shared_expert_gate": False,
}
_CALLED = {
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "apply_residual_connection_post_layernorm": "the residual after the norm",
    "add_bias_linear": "biases (--disable-bias-linear)",
}


def from_megatron_lm(
    source: Path, target: Path, own_arguments: str | None = None, tokenizer: Path | None = None
) -> Config:
    """Make a checkpoint of ours of one of Megatron-LM's loop.

    Args:
        source: Its folder, or the `--save` folder, which means the newest.
        target: Folder to make; it must not exist or be empty. Data files become hard links, or
            copies where the file system has none.
        own_arguments: The run's MOEPP_ARGS, where the checkpoint does not keep its settings.
        tokenizer: A tokenizer.json to put beside the weights.

    Raises:
        ConfigError: If this package does not have the model, the checkpoint cannot be read or lacks
            a tensor, or the folder cannot be written.
    """
    folder = _find_megatron_checkpoint(source)
    reader = TensorReader(folder)
    arguments = _read_arguments(reader)
    config = _config_from_arguments(arguments, own_arguments, folder.resolve().parent.name)
    if tokenizer is not None:
        size = Tokenizer.load(tokenizer).vocab_size
        if size > config.model.vocab_size:
            raise ConfigError(
                f"--tokenizer ({tokenizer}) must fit the model's vocabulary of "
                f"{config.model.vocab_size} tokens and has {size}; use that of the run's data"
            )
    names = reader.weight_names(config)
    target = free_folder(target)
    with partial_folder(target, "DST") as partial:
        writer = ConvertedCheckpointWriter(partial, _PREFIX)
        writer.adopt(reader, names)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, partial / TOKENIZER_FILE)
        writer.complete(config, f"{folder.name} of Megatron-LM's training loop")
        publish(partial, target)
    return config


def _config_from_arguments(arguments: Namespace, own_arguments: str | None, name: str) -> Config:
    """The configuration of the model of Megatron's arguments; ConfigError if we do not have it."""
    for key, wanted in _FIXED.items():
        value = getattr(arguments, key, wanted)
        if value != wanted:
            what = _CALLED.get(key, f"--{key.replace('_', '-')}")
            raise ConfigError(
                f"{what} ({value}) of the checkpoint must be {wanted}: this package's decoder has "
                "nothing else; such a checkpoint cannot be converted"
            )
    try:
        # By the names of `TransformerConfig`.
        fields: Any = SimpleNamespace(**vars(arguments), num_moe_experts=arguments.num_experts)
        moepp = moepp_config(fields, _with_own(arguments, own_arguments))
        model, moe = _model(arguments), _moe(arguments, moepp)
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"the checkpoint's arguments do not fit: {error}") from None
    dtype = "bf16" if getattr(arguments, "bf16", False) else "fp32"
    return assemble(model, moe, {}, name, dtype, getattr(arguments, "lr", None) or 1.0e-4)


def _with_own(arguments: Namespace, own_arguments: str | None) -> Namespace:
    """The arguments including `moepp_*`, from the checkpoint or from MOEPP_ARGS."""
    if hasattr(arguments, "moepp_tau"):
        return arguments
    text = getattr(arguments, "moepp_environment", None) if own_arguments is None else own_arguments
    if text is None:
        raise ConfigError(
            "--moepp-args (absent) must give the run's MOEPP_ARGS, which the checkpoint does not "
            "keep; use --moepp-args '' where the run had none"
        )
    return Namespace(**{**vars(arguments), **vars(environment_arguments(text))})


def _model(arguments: Namespace) -> Fields:
    groups = arguments.num_query_groups if arguments.group_query_attention else None
    return {
        **{name: getattr(arguments, name) for name in _MODEL_FIELDS},
        "num_query_groups": groups,
        "vocab_size": arguments.padded_vocab_size,
        "rotary_base": float(arguments.rotary_base),
        "norm_epsilon": arguments.layernorm_epsilon,
        "tie_embeddings": not arguments.untie_embeddings_and_output_weights,
    }


def _moe(arguments: Namespace, moepp: MoEPPConfig) -> Fields:
    fields = {key: getattr(moepp, key) for key in _MOE_FIELDS}
    has_bias = getattr(arguments, "moe_router_enable_expert_bias", False)
    if moepp.is_vanilla:
        # megatron-core's own router, which has a setting of its own for that.
        before_selection = arguments.moe_router_pre_softmax
        fields["gate_normalization"] = "none" if before_selection else "selected"
        fields["selection_bias"] = has_bias
    return {
        **fields,
        "bias_update_rate": arguments.moe_router_bias_update_rate if has_bias else 0.0,
        "z_loss_coeff": arguments.moe_z_loss_coeff,
        "input_jitter_eps": arguments.moe_input_jitter_eps,
        "ffn_hidden_size": arguments.moe_ffn_hidden_size,
        "shared_expert_ffn_hidden_size": arguments.moe_shared_expert_intermediate_size,
        "layer_freq": arguments.moe_layer_freq,
    }


# Both sides have these under one name.
_MODEL_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "qk_layernorm",
    "seq_length",
    "init_method_std",
)
_MOE_FIELDS = tuple(name for name in DECLARED if name != "fused")


TRACKER_FILE = "latest_checkpointed_iteration.txt"
RELEASE = "release"
# Where megatron-core keeps what is not sharded: in the checkpoint, or before 0.17 in a file.
_COMMON_KEY = "common_state"
_COMMON_FILE = "common.pt"
# Megatron's is some tens of kilobytes.
_MOST_BYTES = 64 * 1024**2


def _find_megatron_checkpoint(source: Path) -> Path:
    """Find the torch_dist checkpoint that a `--save` folder has or is; ConfigError without one."""
    folder = source
    tracker = source / TRACKER_FILE
    if tracker.is_file():
        newest = tracker.read_text(encoding="utf-8", errors="replace").strip()
        folder = source / (f"iter_{int(newest):07d}" if newest.isdecimal() else RELEASE)
    if not (folder / FORMAT_FILE).is_file():
        raise ConfigError(
            f"SRC ({folder}) must be a checkpoint of Megatron-LM in the format torch_dist, and has "
            f"no {FORMAT_FILE}; name a --save folder or one of its iter_* folders, written with "
            "--ckpt-format torch_dist"
        )
    return folder


def _read_arguments(reader: TensorReader) -> Namespace:
    """Read the numbers, texts and lists of a checkpoint's arguments; ConfigError if it cannot."""
    legacy = reader.folder / _COMMON_FILE
    try:
        record = legacy.read_bytes() if legacy.is_file() else reader.read_bytes(_COMMON_KEY)
        common = _unpickled(record)
        # A sharded object is a list with one entry.
        common = common[0] if isinstance(common, list) else common
        values = common["args"].state
        return Namespace(**{name: value for name, value in values.items() if _is_plain(value)})
    except Exception as error:  # whatever damaged or crafted bytes make an unpickler do
        raise ConfigError(
            f"{reader.folder} must hold the arguments of the run that wrote it, as Megatron-LM's "
            f"checkpoints do, and they cannot be read ({type(error).__name__}); name another one"
        ) from None


class _StandIn:
    """The class that replaces every class of the file: it keeps the state that it is given."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        """Accept the items of a class that is a list."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # A class of its own, so that nothing in the file reaches one that others use.
        return type("StandIn", (_StandIn,), {})

    def persistent_load(self, pid: Any) -> Any:
        return _StandIn()  # the data of a tensor


def _unpickled(record: bytes) -> Any:
    """The object in a file of `torch.save`."""
    with zipfile.ZipFile(io.BytesIO(record)) as archive:
        (entry,) = (info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
        if entry.file_size > _MOST_BYTES:
            raise ValueError("too large")
        return _Unpickler(io.BytesIO(archive.read(entry))).load()


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(part) for part in value)
    return value is None or type(value) in (bool, int, float, str)
