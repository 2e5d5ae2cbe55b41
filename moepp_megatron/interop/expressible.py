"""A format of exports, and its limits, as rows of settings that it lacks."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from moepp_megatron.config import Config
from moepp_megatron.config.errors import Problem, raise_problems, show
from moepp_megatron.experts import LOCAL_KINDS, ExpertKind
from moepp_megatron.interop.tensor_rules import Fields, Rules
from moepp_megatron.layer_settings import DECLARED, EXPORTED, EXTENSIONS

# A setting by its dotted name, the values that the format has, and why.
Row = tuple[str, tuple[Any, ...], str]
# Extensions of the layer that other people's models have too; a format without has a row.
_WIDESPREAD = ("selection_bias", "gate_scale")
# What Mixtral, Qwen3-MoE and DeepSeek-MoE have alike.
PLAIN: tuple[Row, ...] = (
    ("moe.score_function", ("softmax",), "scores are softmax probabilities there"),
    ("moe.gate_normalization", ("none", "selected"), "zero experts count in the sum of gates"),
    ("moe.selection_bias", (False,), "scores decide the selection there"),
    ("moe.gate_scale", (1.0,), "gates are not scaled there"),
    ("moe.shared_expert_gate", (False,), "shared experts have no gate there"),
    ("model.qkv_bias", (False,), "queries, keys and values have no biases there"),
    ("model.qk_layernorm_scope", ("head",), "each head is normalised by itself there"),
)


@dataclass(frozen=True)
class Format:
    """One layout of an exported folder: its `config.json`, tensors and warnings of its readers."""

    fields: Callable[[Config], Fields]
    rules: Callable[[Config], Rules]
    classes: tuple[str, str] | None = None
    dtype_field: str = "torch_dtype"
    keeps_unused: bool = False
    warnings: Callable[[Config], Iterator[str]] = lambda config: iter(())


def unknown_there(kinds: Collection[ExpertKind]) -> tuple[Row, ...]:
    """Rows of what a format lacks that has `kinds` of zero-computation experts.

    A kind of experts or a setting that is added to the layer is lacking there too.
    """
    return (
        ("moe.gating_residual", (False,), "gating residuals are unknown there"),
        *(
            (f"moe.{kind.setting}", (0,), f"{kind.name} experts are unknown there")
            for kind in LOCAL_KINDS
            if kind not in kinds
        ),
        *(
            (f"moe.{name}", (DECLARED[name].default,), "it is unknown there")
            for name in EXPORTED
            if name in EXTENSIONS and name not in _WIDESPREAD
        ),
    )


def refuse_settings(config: Config, rows: Iterable[Row], where: str, remedy: str) -> None:
    """Refuse (ConfigError) each row that the model's configuration breaks; `where` it is to run."""
    raise_problems(
        Problem(
            name,
            value,
            f"must be {' or '.join(map(show, accepted))} for {where}: {reason}",
            remedy,
        )
        for name, accepted, reason in rows
        if (value := attrgetter(name)(config)) not in accepted
    )
