"""Turns a Megatron-LM command line into a configuration, and lists what has no counterpart.

What is read: a shell script with arguments in the call or in arrays, or a YAML file with a
mapping of arguments (`MODEL_ARGS:` with keys such as `--num-layers`). Nothing in it is executed.
The configuration has the same model: no zero-computation experts.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.load import parse_config
from moepp_megatron.config.megatron_flags import (
    ABSENT,
    ALWAYS,
    DERIVED,
    LAUNCHER,
    SETTINGS,
    SWITCHES,
    WITHOUT_A_SETTING,
)
from moepp_megatron.config.regular_file import check_regular
from moepp_megatron.config.yaml_file import parse_yaml
from moepp_megatron.layer_settings import SCOPES

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)\+?=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}]*))?\}|(\w+))")

Arguments = dict[str, str]


@dataclass(frozen=True)
class Translation:
    """A configuration from a Megatron-LM command line.

    Attributes:
        content: Sections with settings, for YAML.
        notes: What has no counterpart, differs or is missing, one sentence each.
    """

    content: dict[str, Any]
    notes: tuple[str, ...]


def translate(path: Path, variables: Mapping[str, str]) -> Translation:
    """Translate a file.

    Args:
        path: A shell script, or a YAML file with a mapping of arguments.
        variables: Values of the file's variables, such as TP; they win over those in it.

    Raises:
        ConfigError: The file cannot be read or describes no Megatron-LM run of a MoE model.
    """
    try:
        check_regular(path)
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ConfigError(f"FILE ({path}) cannot be read ({reason}); give a text file") from None
    is_yaml = path.suffix in (".yaml", ".yml")
    arguments = _from_yaml(text, path) if is_yaml else _from_shell(text, path, dict(variables))
    found = {name: _expand(value, variables) for name, value in arguments.items()}
    if "num-experts" not in found:
        raise ConfigError(
            f"FILE ({path}) must hold the arguments of a MoE model, --num-experts among them; "
            "give the script that calls pretrain_gpt.py"
        )
    return _Translator(found).translation(path)


def _from_yaml(text: str, path: Path) -> Arguments:
    """All keys that begin with `--`, wherever they are nested."""
    found: Arguments = {}
    waiting = [parse_yaml(text, str(path))]
    while waiting:
        value = waiting.pop()
        if not isinstance(value, Mapping):
            continue
        for key, inner in value.items():
            if not str(key).startswith("--"):
                waiting.append(inner)
            elif inner is not False:
                words = inner if isinstance(inner, list) else [inner]
                found[_name(str(key))] = " ".join("true" if w is True else str(w) for w in words)
    return found


def _from_shell(text: str, path: Path, variables: dict[str, str]) -> Arguments:
    lexer = shlex.shlex(text.replace("\\\n", " "), posix=True, punctuation_chars="();|&")
    lexer.whitespace_split = True
    found: Arguments = {}
    current: str | None = None
    try:
        for word in lexer:
            assignment = _ASSIGNMENT.fullmatch(word)
            if assignment is not None and assignment[2]:
                variables.setdefault(assignment[1], _expand(assignment[2], variables))
            if word.startswith("--"):
                name, _, value = word.partition("=")
                current = _name(name)
                found[current] = _expand(value, variables)
            elif assignment is not None or set(word) <= set("();|&") or not _is_value(word):
                current = None
            elif current is not None:
                found[current] = f"{found[current]} {_expand(word, variables)}".strip()
    except ValueError as error:
        raise ConfigError(
            f"FILE ({path}) must be a shell script that can be read ({error}); give one with all "
            "quotes closed"
        ) from None
    return {name: value or "true" for name, value in found.items()}


def _is_value(word: str) -> bool:
    """Whether a word can be an argument's value: no program, no command in quotes."""
    return not (word.endswith(".py") or "\n" in word)


def _name(option: str) -> str:
    return option.lstrip("-").replace("_", "-")


def _expand(text: str, variables: Mapping[str, str]) -> str:
    """Put in the variables that are known; the others stay."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        known = variables.get(name, match[2])
        return match[0] if known is None else known

    return _VARIABLE.sub(value, text)


class _Translator:
    """Takes arguments one by one into settings and notes."""

    def __init__(self, arguments: Arguments) -> None:
        self._left = {n: v for n, v in arguments.items() if n not in LAUNCHER}
        self._settings: dict[str, Any] = {}
        self._notes: list[str] = []

    def translation(self, path: Path) -> Translation:
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
        self._take_parallelism()
        self._check_model()
        self._check_rest()
        self._settings["run.dir"] = f"runs/{path.stem}"
        content = _nested(self._settings)
        try:
            parse_config(content)
        except ConfigError as error:
            self._notes += [f"not accepted as it is: {line}" for line in str(error).splitlines()]
        return Translation(content, tuple(self._notes))

    def _take_direct(self) -> None:
        for name, key in SETTINGS.items():
            if name in self._left:
                text = self._left.pop(name)
                self._settings[key] = text if key == "data.split" else parse_yaml(text, f"--{name}")
        modules = self._settings.get("training.recompute_modules")
        if isinstance(modules, str):
            self._settings["training.recompute_modules"] = modules.split()
        for name, (key, value) in SWITCHES.items():
            if self._left.pop(name, None) is not None:
                self._settings[key] = value
                if name == "recompute-activations":
                    self._settings["training.recompute_modules"] = ["core_attn"]
                if name == "moe-enable-deepep":
                    self._settings["moe.dispatcher"] = "flex"

    def _take_batches(self) -> None:
        """Steps from samples."""
        batch = self._settings.get("training.global_batch_size")
        for name, key in (
            ("train-samples", "training.train_iters"),
            ("lr-decay-samples", "optimizer.decay_iters"),
            ("lr-warmup-samples", "optimizer.warmup_iters"),
            ("lr-wsd-decay-samples", "optimizer.wsd_decay_iters"),
        ):
            if name in self._left and isinstance(batch, int):
                self._settings[key] = max(int(float(self._left.pop(name))) // batch, 1)
        decay = self._settings.get(
            "optimizer.decay_iters", self._settings.get("training.train_iters")
        )
        if "lr-warmup-fraction" in self._left and isinstance(decay, int):
            fraction = float(self._left.pop("lr-warmup-fraction"))
            self._settings["optimizer.warmup_iters"] = int(fraction * decay)

    def _take_routing(self) -> None:
        """The router and its loss; the paper's beta is K/E of Megatron's coefficient."""
        settings = self._settings
        settings |= {f"moe.num_{kind}_experts": 0 for kind in ("constant", "copy", "zero")}
        settings["moe.gating_residual"] = False
        if "moe.group_topk" not in settings:
            # Megatron limits nothing then.
            settings.pop("moe.num_groups", None)
        experts, topk = settings["moe.num_ffn_experts"], settings.get("moe.router_topk", 2)
        coefficient = float(self._left.pop("moe-aux-loss-coeff", "0"))
        kind = self._left.pop("moe-router-load-balancing-type", "aux_loss")
        if kind in SCOPES:
            settings["moe.balance_coeff"] = coefficient * experts / topk
            settings["moe.balance_scope"] = SCOPES[kind]
        elif kind != "none":
            self._notes.append(f"--moe-router-load-balancing-type {kind} has no counterpart")
        is_raw = self._left.pop("moe-router-pre-softmax", None) is not None
        if settings.get("moe.score_function", "softmax") == "sigmoid":
            is_raw = topk == 1
        settings["moe.gate_normalization"] = "none" if is_raw else "selected"
        if "moe-layer-freq" in self._left:
            settings["moe.layer_freq"] = _layer_freq(self._left.pop("moe-layer-freq"))

    def _take_parallelism(self) -> None:
        settings = self._settings
        tensor = settings.get("parallel.tensor_model_parallel_size", 1)
        settings.setdefault("parallel.expert_tensor_parallel_size", tensor)
        per_chunk = self._left.get("num-layers-per-virtual-pipeline-stage")
        if per_chunk is not None:
            stages = settings.get("parallel.pipeline_model_parallel_size", 1)
            chunks = settings["model.num_layers"] // (stages * int(per_chunk))
            settings["parallel.virtual_pipeline_model_parallel_size"] = (
                chunks if chunks > 1 else None
            )

    def _check_model(self) -> None:
        """What Megatron's model has by default and this project's has not."""
        latent = "multi-latent-attention" in self._left
        prefix = "model.latent_attention."
        if not latent:
            self._settings = {
                key: value for key, value in self._settings.items() if not key.startswith(prefix)
            }
        else:
            for key, value in (("q_lora_rank", 512), ("kv_lora_rank", 512), ("rope_type", "yarn")):
                self._settings.setdefault(prefix + key, value)
        for name, value in ALWAYS.items():
            given = self._left.pop(name, None)
            if given is None or not _same(given, value):
                shown = "is not given" if given is None else f"is {given}"
                wanted = f"--{name}" if value == "true" else f"--{name} {value}"
                self._notes.append(f"--{name} {shown}: this project's model has {wanted}")

    def _check_rest(self) -> None:
        if "data-path" in self._left:
            self._notes.append(
                "--data-path has no counterpart: set data.path to the prefix and data.tokenizer to "
                "the tokenizer's file, or data.blend for several with weights"
            )
        if "load" in self._left:
            self._notes.append(
                "--load has no counterpart: `moepp convert megatron-lm` turns the checkpoint into "
                "one that checkpoint.load takes"
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
            self._notes.append(f"{shown} has no counterpart")


def _same(given: str, wanted: str) -> bool:
    try:
        return float(given) == float(wanted)
    except ValueError:
        return given == wanted


def _layer_freq(text: str) -> Any:
    """A number, or a list written as in Python: `([0]*1+[1]*26)`."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value < 10_000:
            return node.value
        if isinstance(node, ast.List):
            return [value(each) for each in node.elts]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
            left, right = value(node.left), value(node.right)
            if isinstance(left, list):
                return left + right if isinstance(node.op, ast.Add) else left * right
        raise ValueError

    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError):
        raise ConfigError(
            f"--moe-layer-freq ({text}) must be a number or a list such as ([0]*1+[1]*26); "
            "write it so"
        ) from None


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Sections from dotted names, in the order of the schema."""
    from moepp_megatron.config.reference import section_references

    order = [one.name for section in section_references() for one in section.settings]
    content: dict[str, Any] = {}
    for key in sorted(settings, key=order.index):
        *sections, name = key.split(".")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = settings[key]
    return content


_HEAD = """\
Translated from {file}. The model is the same: for MoE++ remove the counts of zero-computation
experts, gating_residual and gate_normalization below moe:, so that they take their defaults.
"""


class _Dumper(yaml.SafeDumper):
    """Writes lists in one line."""


_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True)
)


def to_yaml(translation: Translation, file: Path) -> str:
    """The configuration as YAML, with the notes as comments at its top."""
    notes = [f"- {note}" for note in translation.notes]
    head = _HEAD.format(file=file.name).splitlines() + (["Look at:", *notes] if notes else [])
    comments = "".join(f"# {line}\n" for line in head)
    return comments + yaml.dump(translation.content, Dumper=_Dumper, sort_keys=False, width=100)
