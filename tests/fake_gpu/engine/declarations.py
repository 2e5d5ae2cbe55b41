"""Declarations of Transformer Engine's extension: functions and enums, read from its C++ source.

`pybind.cpp` names functions, enums and most arguments; `extensions.h` has the types of all.
"""

import re
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch

# transformer_engine.h, which the source of the part for torch lacks; other enums count from 0.
_DTYPES = {
    "kByte": 0,
    "kInt16": 1,
    "kInt32": 2,
    "kInt64": 3,
    "kFloat32": 4,
    "kFloat16": 5,
    "kBFloat16": 6,
    "kFloat8E4M3": 7,
    "kFloat8E5M2": 8,
    "kFloat8E8M0": 9,
    "kFloat4E2M1": 10,
}
_PYBIND, _HEADER = "csrc/extensions/pybind.cpp", "csrc/extensions.h"
_HELPER = "common_headers/common/util/pybind_helper.h"
_LITERALS = {
    "py::none()": None,
    "std::nullopt": None,
    "nullptr": None,
    "true": True,
    "false": False,
}
REQUIRED = object()


@dataclass(frozen=True)
class Parameter:
    """One argument: its name, its C++ type and its default, `REQUIRED` where it has none.

    `named` is whether a call can give it by name: pybind knows names and defaults from itself only.
    """

    name: str
    kind: str
    default: Any = REQUIRED
    named: bool = True


def enums(source):
    """Every enum of the extension whose unpacked source is given."""
    text = (source / _HELPER).read_text() + (source / _PYBIND).read_text()
    pattern = r'enum_<[^>]+>\(\s*\w+,\s*"(\w+)"(.*?);'
    found = {}
    for name, body in re.findall(pattern, text.replace("\\\n", "\n"), re.DOTALL):
        values = re.findall(r'\.value\("(\w+)"', body)
        numbers = {value: _DTYPES.get(value, number) for number, value in enumerate(values)}
        found[name] = IntEnum(name, numbers)
    return found


def functions(source) -> dict[str, list[Parameter]]:
    """Every function of the extension with its arguments in order."""
    header = _without_comments((source / _HEADER).read_text())
    found = {}
    for name, target, rest in _definitions((source / _PYBIND).read_text()):
        parameters = _declared(header, target.rpartition("::")[2].lstrip("&"))
        named = re.findall(r'py::arg\(\s*"(\w+)"\)(?:\s*=\s*([^,]+))?', rest)
        if named and not parameters:
            parameters = [Parameter(each, "py::object") for each, _ in named]
        if named:
            # The name is pybind's, the type the header's.
            parameters = [
                replace(parameter, name=each, default=_value(default) if default else REQUIRED)
                for parameter, (each, default) in zip(parameters, named, strict=True)
            ]
        else:
            parameters = [replace(each, default=REQUIRED, named=False) for each in parameters]
        found[name] = parameters
    return found


def _definitions(text):
    """Name, C++ function and what follows, of each `m.def`."""
    for each in re.finditer(r"\bm\s*\.def\(", text):
        body = text[each.end() : _end(text, each.end())]
        name, target, *rest = _split(body)
        yield name.strip('" '), target, ",".join(rest)


def _declared(header, function) -> list[Parameter]:
    place = re.search(rf"[\w>&*]\s+{function}\(", header)
    if place is None:
        return []
    body = header[place.end() : _end(header, place.end())]
    found = []
    for each in _split(body):
        declaration, _, default = each.partition("=")
        kind, name = re.fullmatch(r"(.*[\s&*])(\w+)", declaration.strip(), re.DOTALL).groups()  # type: ignore[union-attr]
        kind = re.sub(r"\bconst\b|[&*]|at::|std::|transformer_engine::|pytorch::", "", kind)
        found.append(
            Parameter(name, "".join(kind.split()), _value(default) if default else REQUIRED)
        )
    return found


def _value(text):
    """A default; its number, truth value or None."""
    text = text.strip().rstrip(")").strip() if text.count(")") > text.count("(") else text.strip()
    if text in _LITERALS:
        return _LITERALS[text]
    number = re.fullmatch(r"(-?[\d.]+)f?", text)
    if number is None:
        return None
    return float(number[1]) if "." in number[1] else int(number[1])


def _without_comments(text):
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def _end(text, begin):
    """Return the index of the bracket that closes the one opened before `begin`."""
    depth = 1
    for place in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise AssertionError("a bracket is not closed")


def _split(body):
    """At commas outside of brackets and strings."""
    parts, depth, quoted = [""], 0, False
    for letter in body:
        quoted ^= letter == '"'
        if not quoted:
            depth += {"(": 1, "<": 1, "{": 1, ")": -1, ">": -1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


# Of types that torch or Python have; of any other, such as a quantizer, the function itself looks.
_KINDS = {
    "Tensor": (torch.Tensor,),
    # None is false.
    "bool": (bool, int, type(None)),
    "string": (str,),
    "float": (float, int),
    "ScalarType": (torch.dtype,),
    "Generator": (torch.Generator,),
    **dict.fromkeys(("int", "size_t", "int64_t", "uint64_t"), (int,)),
}


def takes(kind, value, enum_types):
    """True if pybind turns a value into an argument of this C++ type."""
    kind = {"MaybeTensor": "optional<Tensor>"}.get(kind, kind)
    if kind.startswith("optional<"):
        return value is None or takes(kind[9:-1], value, enum_types)
    if kind.startswith("vector<"):
        # A tensor on the device would be a sequence too, and each element a wait.
        return isinstance(value, list | tuple) and all(
            takes(kind[7:-1], each, enum_types) for each in value
        )
    if kind in enum_types:
        return isinstance(value, enum_types[kind] | IntEnum)
    return isinstance(value, _KINDS.get(kind, (object,)))
