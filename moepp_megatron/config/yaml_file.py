"""Reads YAML safely: bounded, no duplicate keys, 1e-4 is a number, errors name the place."""

import re
from pathlib import Path
from typing import Any

import yaml

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.paths import looked_at
from moepp_megatron.config.regular_file import check_regular

# Values, keys and collections; an alias counts as all that it stands for. Hundreds are usual.
_MAX_NODES = 20_000
_MAX_DEPTH = 64
# PyYAML takes a second and more for a few hundred thousand characters.
_MAX_CHARACTERS = 300_000
# A path has up to 4095; of 1:1:1..., a number of base 60 in YAML 1.1, time grows quadratically.
_MAX_SCALAR = 10_000
_TOO_LARGE = f"more than {_MAX_NODES} values, aliases written out"
_TOO_DEEP = f"nested more than {_MAX_DEPTH} levels deep, or contains itself"


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader in bounds that refuses duplicate keys and reads exponents as YAML 1.2 does."""

    _num_composed = 0

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:  # noqa: N803 (PyYAML's name)
        """Refuse too many brackets as soon as they are read; PyYAML looks far ahead after each."""
        if self.flow_level >= _MAX_DEPTH:
            raise _refused(_TOO_DEEP, self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def add_indent(self, column: int) -> bool:
        """Refuse too many indentations as soon as they are read."""
        if len(self.indents) >= _MAX_DEPTH:
            raise _refused(_TOO_DEEP, self.get_mark())
        return super().add_indent(column)

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        """Refuse a value that is too long."""
        node = super().compose_scalar_node(anchor)
        if len(node.value) > _MAX_SCALAR:
            problem = f"a value has {len(node.value)} characters, more than {_MAX_SCALAR}"
            raise _refused(problem, node.start_mark)
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse too many nodes before all of them are built."""
        self._num_composed += 1
        if self._num_composed > _MAX_NODES:
            raise _refused(_TOO_LARGE)
        return super().compose_node(parent, index)

    def get_single_node(self) -> yaml.Node | None:
        """Refuse a few nodes that expand to too many: aliases of aliases."""
        node = super().get_single_node()
        if node is not None:
            _expanded(node, {}, 1)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key written twice; PyYAML would silently keep the last one."""
        seen: dict[str, yaml.Mark] = {}
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None,
                        None,
                        f"key {key_node.value!r} is given twice, first on line "
                        f"{seen[key_node.value].line + 1}; keep one of them",
                        key_node.start_mark,
                    )
                seen[key_node.value] = key_node.start_mark
        return super().construct_mapping(node, deep)


def _expanded(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Count the nodes of `node`, with its aliases written out."""
    if id(node) in known:
        return known[id(node)]
    if depth > _MAX_DEPTH:
        raise _refused(_TOO_DEEP, node.start_mark)
    below: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        below = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    count = 1 + sum(_expanded(part, known, depth + 1) for part in below)
    if count > _MAX_NODES:
        raise _refused(_TOO_LARGE, node.start_mark)
    known[id(node)] = count
    return count


def _refused(problem: str, mark: yaml.Mark | None = None) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


# YAML 1.1, which PyYAML reads, takes 1e-4 and 1.0e4 for text; every user means the number.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, source: str) -> Any:
    """Parse one YAML document, which messages call `source`: a file's path, or an override.

    ConfigError if it is not YAML or too long; it says which line is wrong, and why.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ConfigError(
            f"{source}: must have at most {_MAX_CHARACTERS} characters and has {len(text)}; give a "
            "configuration"
        )
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a subclass of SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = " ".join((error.problem or error.context or "it cannot be read").split())
        raise ConfigError(f"{source}{where}: not valid YAML: {problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: scalars that look like a date or number and are none, such as 2024-99-99.
        problem = " ".join(str(error).split())
        raise ConfigError(f"{source}: not valid YAML: {problem}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that must hold a mapping; ConfigError if it does not, or is unreadable."""
    try:
        check_regular(path)
        with path.open(encoding="utf-8") as file:
            text = file.read(_MAX_CHARACTERS + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file{looked_at(path)}; check the path of the configuration"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: must be UTF-8 text; give a YAML file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path}: cannot be read ({reason}); give a readable file") from None
    content = parse_yaml(text, str(path))
    if content is None:
        raise ConfigError(
            f"{path}: the file is empty; write sections such as model: and training:, or base: FILE"
        )
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: must hold a mapping of sections, not {_kind(content)}; "
            "write sections such as model: with indented keys below"
        )
    return content


def _kind(value: Any) -> str:
    """The kind of a YAML value, in words."""
    return "a list" if isinstance(value, list) else "a single value"
