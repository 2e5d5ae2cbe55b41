"""The sections of the configuration by name, and what they declare of themselves."""

from collections.abc import Iterator
from operator import attrgetter
from types import UnionType
from typing import Any, get_args

from moepp_megatron.config.errors import show
from moepp_megatron.config.schema import Config, Section
from moepp_megatron.config.schema.section import Use


def section_models() -> dict[str, type[Section]]:
    """The sections by name, in file order."""
    sections: dict[str, type[Section]] = {}
    for name in Config.model_fields:
        model = subsection(Config, name)
        assert model is not None, f"{name} is no section"
        sections[name] = model
    return sections


def all_sections() -> Iterator[tuple[str, type[Section]]]:
    """Every section by its dotted name, those inside others after them."""
    waiting = list(section_models().items())
    while waiting:
        path, model = waiting.pop(0)
        yield path, model
        for key in model.model_fields:
            if (inner := subsection(model, key)) is not None:
                waiting.append((f"{path}.{key}", inner))


def subsection(model: type[Section], key: str) -> type[Section] | None:
    """The section that `key` of `model` is, or None where it is an ordinary setting.

    A section that may be left out (`X | None`) is one too; see `is_optional`.
    """
    annotation = model.model_fields[key].annotation
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def is_optional(model: type[Section], key: str) -> bool:
    """True if null for the section `key` of `model` is a value of its own, not an empty section."""
    return type(None) in get_args(model.model_fields[key].annotation)


def settings_of_one_run() -> tuple[str, ...]:
    """Overrides that switch off what is one run's, for others of the same configuration."""
    models = dict(all_sections())
    return tuple(
        f"{section}.{key}={show(models[section].model_fields[key].get_default())}"
        for section, key in words("of_one_run")
    )


def used(config: Config, kind: Use) -> Iterator[tuple[str, Any]]:
    """The settings that name something of a kind, with their values; null ones left out."""
    for section, word in words("uses"):
        key, _, its_kind = word.partition("=")
        name = f"{section}.{key}"
        value = attrgetter(name)(config)
        if its_kind == kind and value is not None:
            yield name, value


def words(attribute: str) -> Iterator[tuple[str, str]]:
    """The words of a text that sections, and the bases of these, declare, after their names."""
    for section, model in all_sections():
        for kind in model.__mro__:
            for word in vars(kind).get(attribute, "").split():
                yield section, word


def declared(attribute: str) -> tuple[Any, ...]:
    """The rows that sections, and the bases that they are made of, declare as a class attribute."""
    kinds = dict.fromkeys(kind for _, model in all_sections() for kind in model.__mro__)
    return tuple(row for kind in kinds for row in vars(kind).get(attribute, ()))
