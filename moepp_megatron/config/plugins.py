"""Plugins: entry points of installed packages, which a setting may name.

A package offers an object of kind K (`callbacks`, `datasets`, `optimizers`, `parts`, `schedules`,
`sinks`) in its entry-point group `moepp_megatron.K`. A setting names it as `plugin:NAME`. The bare
name is accepted where the package is installed, and is written as `plugin:NAME` from then on, so
that a run's configuration can be read where it is not. Looking for a name imports nothing; only
`load_plugin` does, and only what the configuration names.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_args

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from moepp_megatron.config.errors import ConfigError, Problem, raise_problems

PREFIX = "plugin:"


@dataclass(frozen=True)
class Plugin:
    """Marks text in a field's type as the name of a plugin: `Annotated[str, Plugin("sinks")]`.

    `kind` is the last part of the entry-point group.
    """

    kind: str

    @property
    def group(self) -> str:
        """The entry-point group."""
        return f"moepp_megatron.{self.kind}"

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Validate text as a name."""
        return core_schema.no_info_after_validator_function(self._with_prefix, handler(source))

    def _with_prefix(self, name: str) -> str:
        """`plugin:NAME`; a bare name must be of an installed package."""
        bare = name.removeprefix(PREFIX)
        if bare and (bare != name or bare in self.installed()):
            return PREFIX + bare
        raise PydanticCustomError("no_plugin", "{rule}|{remedy}", self.refusal(bare))

    def installed(self) -> dict[str, list[EntryPoint]]:
        """The entry points of the group by name; more than one of a name are of several packages.

        A package that is found twice on the path of imports counts once.
        """
        by_name: dict[str, list[EntryPoint]] = {}
        for entry in entry_points(group=self.group):
            same = by_name.setdefault(entry.name, [])
            if entry.value not in (other.value for other in same):
                same.append(entry)
        return by_name

    def refusal(self, name: str, own: tuple[str, ...] = ()) -> dict[str, str]:
        """Return rule and remedy for an unknown name without prefix; `own` are this package's."""
        there = sorted(self.installed())
        installed = ", ".join(there) if there else "none is installed"
        rule = f"an entry point of the group {self.group} ({installed})"
        near = get_close_matches(name.lower(), [*own, *there], n=1, cutoff=0.5)
        remedy = (
            f"use {near[0]}" if near else "install the package that has it, or correct the name"
        )
        return {
            "rule": f"must be one of {', '.join(own)}, or {rule}" if own else f"must be {rule}",
            "remedy": remedy,
        }

    def find(self, setting: str, name: str) -> EntryPoint:
        """Return a setting's entry point; ConfigError if no package or more than one offers it."""
        bare = name.removeprefix(PREFIX)
        candidates = self.installed().get(bare, [])
        if not candidates:
            raise_problems([Problem(setting, name, **self.refusal(bare))])
        if len(candidates) > 1:
            places = " and ".join(entry.value for entry in candidates)
            rule = f"must be of one package, and is of several ({places})"
            raise_problems([Problem(setting, name, rule, "uninstall all but one of them")])
        return candidates[0]


def load_plugin(kind: str, setting: str, name: str) -> Any:
    """Import what a setting names; ConfigError if it is not installed or cannot be imported."""
    entry = Plugin(kind).find(setting, name)
    try:
        return entry.load()
    except Exception as error:  # whatever a package raises on its import
        text = " ".join(str(error).split())
        raise ConfigError(
            f"{setting} ({name}) must be importable, and {entry.value} raises "
            f"{type(error).__name__}: {text}; repair or reinstall the package"
        ) from error


def plugin_of(annotation: Any) -> Plugin | None:
    """The mark in a field's type, in whatever union or list it is."""
    if isinstance(annotation, Plugin):
        return annotation
    return next(filter(None, map(plugin_of, get_args(annotation))), None)


def check_plugins(config: Iterable[tuple[str, Any]]) -> None:
    """Raise ConfigError for a plugin that is not installed, without importing any."""
    for setting, kind, name in _named(config):
        Plugin(kind).find(setting, name)


def _named(config: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Setting, kind and name of each plugin that a configuration names."""
    for section, values in config:
        for key, field in type(values).model_fields.items():
            mark = plugin_of(field.annotation)
            value = getattr(values, key)
            for name in value if isinstance(value, list) else [value]:
                if mark is not None and str(name).startswith(PREFIX):
                    yield f"{section}.{key}", mark.kind, name
