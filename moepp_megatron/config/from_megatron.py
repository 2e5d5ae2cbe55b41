"""Turns a Megatron-LM command line into a configuration, and lists what has no counterpart.

The configuration has the same model: zero-computation experts only from ZEDA's fork of Megatron.
"""

import ast
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.load import nested, parse_config
from moepp_megatron.config.megatron_file import Arguments, read_arguments
from moepp_megatron.config.megatron_flags import (
    ABSENT,
    ABSENT_WITH,
    ALWAYS,
    DERIVED,
    SETTINGS,
    SWITCHES,
    WITHOUT_A_SETTING,
)
from moepp_megatron.config.sections import all_sections
from moepp_megatron.config.yaml_file import parse_yaml
from moepp_megatron.layer_settings import SCOPES

_MOST_LAYERS = 10_000
# Of ZEDA's fork: a loss, and settings that count experts of a `--zero-experts-type`.
_GROUPED = "grouped_aux_loss"
_ZERO_EXPERTS = {"zero": "moe.num_zero_experts", "copy": "moe.num_copy_experts"}


@dataclass(frozen=True)
class _Translation:
    """A configuration, and notes on what has no counterpart, differs or is missing."""

    content: dict[str, Any]
    notes: tuple[str, ...]

    def to_yaml(self, file: Path) -> str:
        """The configuration as YAML, with the notes as comments at its top."""
        notes = [f"- {note}" for note in self.notes]
        head = _HEAD.format(file=file.name).splitlines() + (["Look at:", *notes] if notes else [])
        comments = "".join(f"# {line}\n" for line in head)
        return comments + yaml.dump(self.content, Dumper=_Dumper, sort_keys=False, width=100)


def translate(path: Path, variables: Mapping[str, str]) -> _Translation:
    """Translate a shell script, or a YAML file with a mapping of arguments.

    `variables` holds values of the file's variables, such as TP, which win over those in it.
    ConfigError if it cannot be read or describes no Megatron-LM run of a MoE model.
    """
    arguments, notes = read_arguments(path, variables)
    if "num-experts" not in arguments:
        raise ConfigError(
            f"FILE ({path}) must hold the arguments of a MoE model, --num-experts among them; "
            "give the script that calls pretrain_gpt.py or pretrain_hybrid.py"
        )
    return _Translator(arguments, notes).translation(path)


class _Translator:
    """Takes arguments one by one into settings and notes."""

    def __init__(self, arguments: Arguments, notes: list[str]) -> None:
        self._left = {name: " ".join(words) or "true" for name, words in arguments.items()}
        self._prefixes = arguments.get("data-path", [])
        self._settings: dict[str, Any] = {}
        self._notes = notes

    def translation(self, path: Path) -> _Translation:
        """Translate everything."""
        for name, value in self._left.items():
            if "$" in value and name not in WITHOUT_A_SETTING:
                self._notes.append(
                    f"--{name} {value} has a variable without a value: give NAME=VALUE"
                )
        self._left = {n: v for n, v in self._left.items() if "$" not in v}
        self._settings |= ABSENT
        self._take_direct()
        self._take_batches()
        self._take_routing()
        self._take_pattern()
        self._take_data()
        self._take_parallelism()
        self._take_model()
        self._check_rest()
        self._settings["run.dir"] = f"runs/{path.stem}"
        content = _sections(self._settings)
        problems = _problems(content)
        if "model.vocab_size" not in self._settings:
            # The tokenizer's, which hides no other rule; Megatron rounds it up like this.
            stand_in = 128 * self._whole("tensor-model-parallel-size", 1)
            problems += _problems(_sections(self._settings | {"model.vocab_size": stand_in}))
        self._notes += [f"not accepted as it is: {line}" for line in dict.fromkeys(problems)]
        return _Translation(content, tuple(self._notes))

    def _take_direct(self) -> None:
        for name, key in SETTINGS.items():
            if name in self._left:
                text = self._left.pop(name)
                self._settings[key] = text if key == "data.split" else parse_yaml(text, f"--{name}")
        for key in ("training.recompute_modules", "megatron.offload_modules"):
            if isinstance(modules := self._settings.get(key), str):
                self._settings[key] = modules.split()
        for name, (key, value) in SWITCHES.items():
            if self._left.pop(name, None) is not None:
                self._settings[key] = value
                if name == "moe-enable-deepep":
                    self._settings["moe.dispatcher"] = "flex"
        for key, needed, absent in ABSENT_WITH:
            if key in self._settings and needed in (None, self._settings[key]):
                self._settings = absent | self._settings

    def _take_batches(self) -> None:
        """Steps from samples."""
        batch = self._settings.get("training.global_batch_size")
        for name, key in (
            ("train-samples", "training.train_iters"),
            ("lr-decay-samples", "optimizer.decay_iters"),
            ("lr-warmup-samples", "optimizer.warmup_iters"),
            ("lr-wsd-decay-samples", "optimizer.wsd_decay_iters"),
        ):
            if name in self._left and type(batch) is int and batch > 0:
                samples = _number(name, self._left.pop(name))
                self._settings[key] = max(int(samples) // batch, 1)
        decay = self._settings.get(
            "optimizer.decay_iters", self._settings.get("training.train_iters")
        )
        if "lr-warmup-fraction" in self._left and isinstance(decay, int):
            fraction = _number("lr-warmup-fraction", self._left.pop("lr-warmup-fraction"))
            self._settings["optimizer.warmup_iters"] = int(fraction * decay)

    def _take_routing(self) -> None:
        """The router and its loss; the paper's beta is K/E of Megatron's coefficient."""
        settings = self._settings
        settings |= {f"moe.num_{kind}_experts": 0 for kind in ("constant", "copy", "zero")}
        settings["moe.gating_residual"] = False
        if "moe.group_topk" not in settings:
            # Megatron limits nothing then.
            settings.pop("moe.num_groups", None)
        topk = self._whole("moe-router-topk", 2)
        zero_experts = self._take_zero_experts()
        self._take_balance((self._whole("num-experts") + zero_experts) / topk, zero_experts > 0)
        if not settings.get("moe.selection_bias"):
            settings.pop("moe.bias_update_rate", None)
        else:
            settings.setdefault("moe.bias_update_rate", 1.0e-3)
        is_raw = self._left.pop("moe-router-pre-softmax", None) is not None
        if settings.get("moe.score_function", "softmax") != "softmax":
            is_raw = topk == 1
        settings["moe.gate_normalization"] = "none" if is_raw else "selected"
        if "moe-layer-freq" in self._left:
            settings["moe.layer_freq"] = _layer_freq(self._left.pop("moe-layer-freq"))

    def _take_zero_experts(self) -> int:
        """Take ZEDA's number of zero-computation experts, all of one kind."""
        count = int(_number("num-zero-experts", self._left.pop("num-zero-experts", "0")))
        kind = self._left.pop("zero-experts-type", "zero")
        if kind not in _ZERO_EXPERTS:
            raise ConfigError(
                f"--zero-experts-type ({kind}) must be {' or '.join(_ZERO_EXPERTS)}; give it so"
            )
        self._settings[_ZERO_EXPERTS[kind]] = count
        return count

    def _zero_expert_weight(self) -> float:
        name = "moe-zero-expert-weight"
        weight = _number(name, self._left.get(name, "1"))
        if weight <= 0:
            raise ConfigError(f"--{name} ({weight:g}) must be above 0; give it so")
        return weight

    def _take_balance(self, factor: float, has_zero_experts: bool) -> None:
        """Megatron adds up several losses, each with its coefficient; a layer here has one."""
        name = "moe-aux-loss-coeff"
        kinds = self._left.pop("moe-router-load-balancing-type", "aux_loss").split()
        coefficients = [_number(name, each) for each in self._left.pop(name, "0").split()]
        losses = dict(zip(kinds, [*coefficients, *[0.0] * len(kinds)], strict=False))
        scopes = SCOPES | {_GROUPED: "microbatch"}
        known = [kind for kind in losses if kind in scopes]
        taken = next((kind for kind in known if losses[kind] > 0), next(iter(known), None))
        if taken is not None:
            is_grouped = taken == _GROUPED
            self._settings["moe.balance_coeff"] = losses[taken] * (1.0 if is_grouped else factor)
            self._settings["moe.balance_scope"] = scopes[taken]
            if is_grouped:
                self._settings["moe.balance_loss"] = "grouped"
            if has_zero_experts and losses[taken] > 0:
                # Megatron's own losses have all experts equal.
                self._settings["moe.tau"] = 1.0 / self._zero_expert_weight() if is_grouped else 1.0
        for kind, coefficient in losses.items():
            if kind not in scopes and kind != "none":
                self._notes.append(f"--moe-router-load-balancing-type {kind} has no counterpart")
            elif kind not in (taken, "none") and coefficient > 0:
                self._notes.append(
                    f"--moe-router-load-balancing-type {kind} (--{name} {coefficient:g}) is left "
                    f"out: a layer has one balance loss, here {taken}"
                )
        if len(coefficients) > len(kinds):
            self._notes.append(
                f"--{name} has {len(coefficients)} numbers for {len(kinds)} of "
                "--moe-router-load-balancing-type: the first are taken"
            )

    def _take_data(self) -> None:
        """A prefix, or weights and prefixes in turn; of several without weights all is read."""
        words = self._prefixes
        if self._left.pop("data-path", None) is None:
            return
        weights = [_number_or_none(word) for word in words[::2]]
        if len(words) == 1:
            self._settings["data.path"] = words[0]
        elif words and len(words) % 2 == 0 and None not in weights:
            parts = zip(words[1::2], weights, strict=True)
            self._settings["data.blend"] = [{"path": path, "weight": w} for path, w in parts]
        else:
            self._notes.append(
                f"--data-path names {len(words)} prefixes without weights, which Megatron reads "
                "whole: write data.blend with a weight for each, such as its number of tokens"
            )
        self._notes.append(
            "--data-path: set data.tokenizer to the tokenizer's file, unless the data was "
            "prepared by moepp"
        )

    def _whole(self, name: str, default: int | None = None) -> int:
        """The setting of an argument that others are derived from."""
        value = self._settings.get(SETTINGS[name], default)
        if type(value) is not int or value < 1:
            raise ConfigError(
                f"--{name} ({value}) must be a whole number above 0; give it so, and a variable in "
                "it as NAME=VALUE"
            )
        return value

    def _take_parallelism(self) -> None:
        settings = self._settings
        tensor = settings.get("parallel.tensor_model_parallel_size", 1)
        settings.setdefault("parallel.expert_tensor_parallel_size", tensor)
        per_chunk = self._left.get("num-layers-per-virtual-pipeline-stage")
        if per_chunk is not None:
            layers = _number("num-layers-per-virtual-pipeline-stage", per_chunk)
            stages = self._whole("pipeline-model-parallel-size", 1)
            chunks = self._whole("num-layers") // (stages * max(int(layers), 1))
            settings["parallel.virtual_pipeline_model_parallel_size"] = (
                chunks if chunks > 1 else None
            )

    def _take_pattern(self) -> None:
        """Take the layers of a hybrid pattern, where each is an attention and then an FFN."""
        names = ("hybrid-layer-pattern", "hybrid-override-pattern")
        name = next((name for name in names if name in self._left), None)
        if name is None:
            return
        pattern = self._left.pop(name)
        main, *depths = pattern.split("/")
        attention = "+" if "multi-latent-attention" in self._left else "*"
        layer = re.compile(rf"\{attention}[E-]|\[\{attention}[E-]\]")
        stages = [layer.findall(stage) for stage in main.split("|")]
        layers = [each for stage in stages for each in stage]
        if "|".join("".join(stage) for stage in stages) != main or set(depths) - set(layers[-1:]):
            raise ConfigError(
                f"--{name} ({pattern}) must hold whole layers, which are {attention}E or "
                f"{attention}-, | between stages, and /{attention}E where the last layer is that: "
                "there are no Mamba or other layers here; keep this model in Megatron"
            )
        self._settings["model.num_layers"] = len(layers)
        self._settings["moe.layer_freq"] = [int("E" in each) for each in layers]
        if depths:
            self._settings["model.mtp_num_layers"] = len(depths)
        if len(stages) > 1:
            text = "|".join("t" * len(stage) for stage in stages)
            layout = f"E{text}{'m' * len(depths)}L"
            self._settings["parallel.pipeline_model_parallel_layout"] = layout

    def _take_model(self) -> None:
        """Fill in defaults of Megatron's model where this project's differs."""
        wide = self._settings.get("model.hidden_size")
        if type(wide) is int:
            is_gated = "swiglu" in self._left
            width = int(wide * 4 * 2 / 3 / 64) * 64 if is_gated else 4 * wide
            self._settings.setdefault("model.ffn_hidden_size", width)
        if "group-query-attention" in self._left:
            self._settings.setdefault("model.num_query_groups", 1)
        else:
            self._settings.pop("model.num_query_groups", None)
        prefix = "model.latent_attention."
        if "multi-latent-attention" not in self._left:
            self._settings = {
                key: value for key, value in self._settings.items() if not key.startswith(prefix)
            }
        else:
            for key, value in (("kv_lora_rank", 32), ("rope_type", "yarn")):
                self._settings.setdefault(prefix + key, value)
            if self._settings[f"{prefix}rope_type"] == "yarn":
                self._settings.setdefault(f"{prefix}rotary_scaling_factor", 1.0)
        for name, value in ALWAYS.items():
            given = self._left.pop(name, None)
            if given is None or not _same(given, value):
                shown = "is not given" if given is None else f"is {given}"
                wanted = f"--{name}" if value == "true" else f"--{name} {value}"
                self._notes.append(f"--{name} {shown}: this project's model has {wanted}")

    def _check_rest(self) -> None:
        if "load" in self._left:
            self._notes.append(
                "--load: `moepp convert megatron-lm` turns the checkpoint into one that "
                "checkpoint.load takes"
            )
        for name in ("step-batch-size-schedule", "rampup-batch-size"):
            if name in self._left:
                self._notes.append(
                    f"--{name} is not taken over: write it as training.batch_ramp, pairs of "
                    "tokens and sequences per step"
                )
        for name, value in self._left.items():
            if name in WITHOUT_A_SETTING or name in DERIVED:
                continue
            shown = f"--{name}" if value == "true" else f"--{name} {value}"
            near = get_close_matches(name, [*SETTINGS, *SWITCHES, *DERIVED, *ALWAYS], 1, 0.85)
            hint = f"; did you mean --{near[0]}?" if near else ""
            self._notes.append(f"{shown} has no counterpart{hint}")


def _problems(content: Mapping[str, Any]) -> list[str]:
    try:
        parse_config(content)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def _number_or_none(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _number(name: str, text: str) -> float:
    number = _number_or_none(text)
    if number is None:
        raise ConfigError(f"--{name} ({text}) must be a number; write it as 1000 or 1e-3")
    return number


def _same(given: str, wanted: str) -> bool:
    return given == wanted or _number_or_none(given) == _number_or_none(wanted) is not None


def _layer_freq(text: str) -> Any:
    """A number, or a list written as in Python: `([0]*1+[1]*26)`."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value < _MOST_LAYERS:
            return node.value
        if isinstance(node, ast.List):
            return [value(each) for each in node.elts]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
            left, right = value(node.left), value(node.right)
            if isinstance(left, list) and isinstance(node.op, ast.Add):
                return left + right
            if isinstance(left, list) and len(left) * right < _MOST_LAYERS:
                return left * right
        raise ValueError

    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise ConfigError(
            f"--moe-layer-freq ({text}) must be a number or a list such as ([0]*1+[1]*26); "
            "write it so"
        ) from None


def _sections(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Sections from dotted names, in the order of the schema."""
    order = [f"{path}.{key}" for path, model in all_sections() for key in model.model_fields]
    return nested((key.split("."), settings[key]) for key in sorted(settings, key=order.index))


_HEAD = """\
Translated from {file}. The model is the same: for MoE++ remove the counts of zero-computation
experts, gating_residual and gate_normalization below moe:, so that they take their defaults.
"""


class _Dumper(yaml.SafeDumper):
    """Writes lists in one line."""


_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True)
)
