"""Compares a configuration with the one that a checkpoint was written with, before any tensor."""

from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

from moepp_megatron.config import Config, ConfigError, load_config, parse_split
from moepp_megatron.config.errors import Problem, raise_problems, show
from moepp_megatron.experts import KINDS
from moepp_megatron.file_names import CONFIG_FILE
from moepp_megatron.training.checkpoint.files import SavedRecord


def _latent_widths(config: Config) -> dict[str, Any] | None:
    """MLA settings that determine tensor shapes (RoPE settings do not)."""
    latent = config.model.latent_attention
    if latent is None:
        return None
    names = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
    return {name: getattr(latent, name) for name in names}


def _moe_layers(config: Config) -> list[bool]:
    return config.moe.moe_layer_pattern(config.model.num_layers)


def _dense_width(config: Config) -> int | None:
    """FFN width of the dense layers; None if there are none."""
    return None if all(_moe_layers(config)) else config.model.ffn_hidden_size


def _expert_width(config: Config) -> int | None:
    return config.expert_ffn_hidden_size if any(_moe_layers(config)) else None


def _split(config: Config) -> Any:
    """Shares of the parts, normalised; None for the corpus's own split."""
    split = config.data.split
    weights = None if split is None else parse_split(split)
    if weights is None or sum(weights) == 0:
        return split
    # Rounded, since 98,2,0 and 0.98,0.02,0 are the same split.
    return [round(weight / sum(weights), 9) for weight in weights]


# Settings that say by themselves what they mean.
_PLAIN = (
    "model.num_layers",
    "model.mtp_num_layers",
    "model.hidden_size",
    "model.vocab_size",
    "model.num_attention_heads",
    "model.tie_embeddings",
    "model.qkv_bias",
    "model.qk_layernorm",
    "model.qk_layernorm_scope",
    "moe.two_layer_gate",
    *(f"moe.{kind.setting}" for kind in KINDS),
    "moe.shared_expert_ffn_hidden_size",
    "moe.shared_expert_gate",
)
# What decides names and shapes of parameters, as its meaning: defaults resolved, and None where a
# setting has no effect, so that two ways to write the same model compare equal.
_SHAPES: dict[str, Callable[[Config], Any]] = {
    **{name: attrgetter(name) for name in _PLAIN},
    "model.ffn_hidden_size": _dense_width,
    "model.num_query_groups": lambda c: c.model.query_groups,
    "model.kv_channels": lambda c: c.model.head_dim,
    "model.latent_attention": _latent_widths,
    "moe.constants_shared": lambda c: c.moe.shares_constants,
    # The first MoE layer's router never has one.
    "moe.gating_residual": lambda c: c.moe.gating_residual and sum(c.router_pattern) > 1,
    "moe.ffn_hidden_size": _expert_width,
    "moe.layer_freq": _moe_layers,
}
# Settings of which two values may mean the same.
_MEANINGS: dict[str, Callable[[Config], Any]] = {**_SHAPES, "data.split": _split}
# Sections that decide what is trained. The degrees of `parallel` are reported as the layout.
_TRAINED = ("model", "moe", "precision", "data", "optimizer", "training", "distillation")
_SECTIONS = (*_TRAINED, "megatron")


def check_compatible(checkpoint: Path, config: Config) -> Config:
    """Return the configuration that a checkpoint was written with, if the run can continue it.

    ConfigError, with one line per setting, if its model has other shapes, or if its state is to be
    loaded and is of another optimizer or of other batches of `data.blend` or `data.stages`.
    """
    try:
        saved = load_config(checkpoint / CONFIG_FILE)
    except ConfigError as error:
        raise ConfigError(
            f"checkpoint ({checkpoint}) must have a configuration that this version reads, and: "
            f"{error}; convert it, or use the version that wrote it"
        ) from error
    raise_problems(
        [*_shape_problems(checkpoint, saved, config), *_state_problems(checkpoint, saved, config)]
    )
    return saved


def differences(before: Config, now: Config, all_of: bool = False) -> list[tuple[str, Any, Any]]:
    """Name, old value and new value of each setting whose meaning has changed.

    Of those that decide what is trained, or of all.
    """
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    return [
        (name, old[section].get(key), value)
        for section in (new if all_of else _SECTIONS)
        for key, value in new[section].items()
        if old[section].get(key) != value
        and not _means_the_same(name := f"{section}.{key}", before, now)
    ]


def _means_the_same(name: str, one: Config, other: Config) -> bool:
    meaning = _MEANINGS.get(name)
    return meaning is not None and meaning(one) == meaning(other)


def _shape_problems(checkpoint: Path, saved: Config, config: Config) -> list[Problem]:
    problems = []
    for name, meaning in _SHAPES.items():
        wanted, found = meaning(config), meaning(saved)
        if wanted == found or _follows(name, saved, config):
            continue
        wanted, found = _shown(config, name, wanted), _shown(saved, name, found)
        rule = f"must be that of the checkpoint {checkpoint} ({show(found)})"
        remedy = f"use {show(found)}, or load another checkpoint"
        if name == "moe.layer_freq":
            rule = f"must place the MoE layers as the checkpoint {checkpoint} ({show(found)})"
        problems.append(Problem(name, wanted, rule, remedy))
    return problems


def _state_problems(checkpoint: Path, saved: Config, config: Config) -> Iterator[Problem]:
    """Yield changed settings that only a run resumed with its state must keep."""
    if not config.checkpoint.load_optimizer or SavedRecord.read(checkpoint) is None:
        return
    kind, wanted = saved.optimizer.kind, config.optimizer.kind
    if kind != wanted:
        yield Problem(
            "optimizer.kind",
            wanted,
            f"must be that of the checkpoint {checkpoint} ({kind}), whose state it continues",
            f"use {kind}, or in another run.dir checkpoint.load_optimizer=false, which takes "
            "only the weights",
        )
    before, now = saved.training.global_batch_size, config.training.global_batch_size
    data = config.data
    # Where stages begin and how much is drawn of each folder follow from batches of one size.
    if (data.stages and now != before) or (data.blend and now < before):
        yield Problem(
            "training.global_batch_size",
            now,
            f"must be that of the checkpoint {checkpoint} ({before}), after which data.blend and "
            "data.stages would continue with other samples",
            f"use {before}; with only data.blend more will do, too",
        )


def _follows(name: str, saved: Config, config: Config) -> bool:
    """True if a difference follows from another setting's, which is reported instead."""
    both = (saved, config)
    if name == "moe.layer_freq":
        return saved.model.num_layers != config.model.num_layers
    if name == "model.ffn_hidden_size":
        return None in map(_dense_width, both)
    is_same_text = attrgetter(name)(saved) == attrgetter(name)(config)
    if name == "moe.ffn_hidden_size":
        is_reported = is_same_text and None not in map(_dense_width, both)
        return is_reported or None in map(_expert_width, both)
    return is_same_text


def _shown(config: Config, name: str, meaning: Any) -> Any:
    """A setting as it was written, or its default."""
    value = attrgetter(name)(config)
    return meaning if value is None or name == "model.latent_attention" else value
