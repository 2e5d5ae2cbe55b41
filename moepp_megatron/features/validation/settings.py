"""Settings of validation in the sections `training` and `data`."""

from typing import Annotated, ClassVar

from moepp_megatron.config.rows import each, entries, no_effect_with, table
from moepp_megatron.config.schema.section import ConfigPath, Section, Unit


class ValidationSettings(Section):
    """Interval and length of validations."""

    eval_interval: Annotated[int, Unit("steps", ge=0)] = 0
    """Steps between validations; 0 validates only at the end"""
    eval_iters: Annotated[int, Unit("steps", ge=0)] = 4
    """Global batches per validation; 0 never validates"""

    megatron_flags: ClassVar[str] = "eval-interval eval-iters"
    no_effect = table(
        no_effect_with(
            "training.eval_iters",
            0,
            "training.eval_interval data.validation",
            "set training.eval_iters above 0",
        ),
    )


class ValidationSets(Section):
    """Data of further validations."""

    validation: dict[str, ConfigPath] = {}
    """Further validation sets, {name: folder}, each with its own loss: the validation part of a
    folder that is trained on, all documents of any other"""

    own_rules = table(
        # They name metrics, in records and in what others read.
        each(
            entries("data.validation"),
            lambda name: not name.strip() or not name.isprintable(),
            "must have names of printable characters",
            "use a word, such as {{law: DIR}}",
        ),
    )
