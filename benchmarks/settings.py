"""`docs/settings.md`: every setting with default, unit, range and meaning, from the schema alone.

Write it anew: `python -m benchmarks.settings`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from moepp_megatron.config.known_keys import is_optional, section_models, subsection
from moepp_megatron.config.problem import show
from moepp_megatron.config.schema import Section

FILE = Path(__file__).parents[1] / "docs" / "settings.md"
_HEAD = """\
# Settings

Written by `python -m benchmarks.settings` from `moepp_megatron/config/schema`; do not edit.
Set any of them in a YAML file or on the command line (`moe.tau=0.5`). Unit 1 is a pure number,
- no quantity. What must hold between settings is checked at the start
(`moepp train CONFIG --dry-run`).
"""
_SIGNS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}"}


def page() -> str:
    """The page."""
    parts = [_HEAD]
    for name, model in section_models().items():
        parts += _section(name, model)
    return "\n".join(parts)


def _section(path: str, model: type[Section], note: str = "") -> Iterator[str]:
    """The section's table, then those of the sections inside it."""
    inside: list[tuple[str, type[Section], str]] = []
    rows = []
    for key, field in model.model_fields.items():
        name = f"{path}.{key}"
        section, entry = subsection(model, key), _entry(field)
        if section is not None:
            optional = " May be null." if is_optional(model, key) else ""
            inside.append((name, section, f"{field.description}.{optional}"))
        elif entry is not None:
            inside.append((f"{name}[]", entry, f"{field.description}."))
        else:
            cells = (f"`{key}`", _default(field), _unit(field), _range(field), field.description)
            rows.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    yield f"## {path}\n"
    yield f"{note or ' '.join((model.__doc__ or '').split())}\n"
    if rows:
        yield "| setting | default | unit | range | what it is |\n|---|---|---|---|---|"
        yield "\n".join(rows) + "\n"
    for name, section, text in inside:
        yield from _section(name, section, text)


def _entry(field: FieldInfo) -> type[Section] | None:
    """The section that each entry of a list is."""
    for kind in get_args(field.annotation):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    return f"`{show(field.get_default(call_default_factory=True, validated_data={}))}`"


def _unit(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    assert isinstance(extra, dict), f"{field} has no unit"
    return str(extra["unit"])


def _range(field: FieldInfo) -> str:
    bounds = [
        text.format(f"{getattr(each, sign):g}")
        for each in field.metadata
        for sign, text in _SIGNS.items()
        if getattr(each, sign, None) is not None
    ]
    values = [show(value).strip("'") for value in _choices(field.annotation)]
    return ", ".join(bounds + values)


def _choices(annotation: Any) -> Iterator[Any]:
    """The values of each Literal in a type, both truth values, and None where it may be null."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif annotation is bool:
        yield from (True, False)
    elif annotation is type(None):
        yield None
    elif isinstance(annotation, UnionType):
        for kind in get_args(annotation):
            yield from _choices(kind)


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
