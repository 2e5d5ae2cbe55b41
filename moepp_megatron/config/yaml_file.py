"""Reading YAML: safe, without duplicate keys, with 1e-4 as a number, with errors that say where."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from moepp_megatron.config.errors import ConfigError


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads exponents as YAML 1.2 does."""

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


# YAML 1.1, which PyYAML reads, takes 1e-4 and 1.0e4 for text; every user means the number.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, source: str) -> Any:
    """Parse one YAML document.

    Args:
        text: The document.
        source: What to call it in messages: a file's path, or an override.

    Raises:
        ConfigError: Not YAML; the message names the source, the line and what is wrong there.
    """
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
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigError: The file is missing, unreadable, empty, not YAML or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check the path of the configuration") from None
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
    """What a reader would call this YAML value."""
    return "a list" if isinstance(value, list) else "a single value"
