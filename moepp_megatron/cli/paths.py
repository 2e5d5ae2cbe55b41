"""Every path of the command line is checked in one place, before a command sees it.

So is `--json -`, which prints.
"""

import contextlib
import errno
import functools
import os
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from moepp_megatron.cli.echo import echo
from moepp_megatron.config import ConfigError, UnfitError
from moepp_megatron.config.errors import Problem, raise_problems
from moepp_megatron.config.paths import path_problem, place_problem
from moepp_megatron.file_names import is_record
from moepp_megatron.runtime.object_store import ObjectPath

# What --json takes for stdout.
_STDOUT = Path("-")
# Kept in memory where that is possible: a doctor's patient may have a full disk.
_IN_MEMORY = "/dev/shm"
# Options that name a file to write, where their metavar is a file.
_WRITTEN = ("--out", "--json")
# What people edit is never replaced, and a result by its own kind only.
_EDITED = ".yaml"


def check_paths(app: typer.Typer) -> None:
    """Have the commands of `app` refuse what is no path of this machine, such as s3://.

    A file that cannot be written is refused too, before the minutes of work that it is for.
    """
    for command in app.registered_commands:
        assert command.callback is not None, "a command without a function"
        command.callback = _checked(command.callback)
    for group in app.registered_groups:
        assert group.typer_instance is not None, "a group without commands"
        check_paths(group.typer_instance)


@dataclass(frozen=True)
class _Parameter:
    """A parameter of a command: its name as users write it, and the suffix of a file it writes."""

    shown: str
    suffix: str


def _checked(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def call(**arguments: Any) -> Any:
        parameters = _parameters(command)
        written = {
            name: value
            for name, value in arguments.items()
            if isinstance(value, Path) and value != _STDOUT and parameters[name].suffix
        }
        for name, value in arguments.items():
            shown = parameters[name].shown
            for one in value if isinstance(value, list) else [value]:
                check = place_problem if isinstance(one, ObjectPath) else path_problem
                problem = check(str(one)) if isinstance(one, Path) else None
                if problem is not None:
                    raise_problems([Problem(shown, str(one), *problem)])
            if name in written:
                _check_writable(shown, value)
        _check_replaced(parameters, written, arguments)
        with contextlib.ExitStack() as stack:
            for name, value in arguments.items():
                if value == _STDOUT and parameters[name].shown == "--json":
                    arguments[name] = stack.enter_context(_printed_file())
            return command(**arguments)

    return call


@contextlib.contextmanager
def _printed_file() -> Iterator[Path]:
    """A file that is printed at the end; all else that would be printed, also by ranks, is not."""
    place = _IN_MEMORY if os.access(_IN_MEMORY, os.W_OK) else None
    try:
        temporary = tempfile.TemporaryDirectory(prefix="moepp-", dir=place)
    except OSError as error:
        raise UnfitError(
            f"--json (-) needs a temporary folder that can be written ({error.strerror}); set "
            "TMPDIR, or name a file"
        ) from None
    with temporary as folder, open(os.devnull, "w") as nowhere:
        file = Path(folder) / "json"
        sys.stdout.flush()
        stdout = os.dup(1)
        os.dup2(nowhere.fileno(), 1)
        try:
            with contextlib.redirect_stdout(nowhere):
                yield file
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
            if file.exists():
                echo(file.read_text(encoding="utf-8").rstrip())


def _check_writable(name: str, path: Path) -> None:
    """Refuse a file whose place, or the folder that is there above it, takes none."""
    # Of several ranks the first one writes.
    if os.environ.get("RANK", "0") != "0":
        return
    place = path
    while not os.path.lexists(place):
        place = place.parent
    is_special = path.exists() and not path.is_file() and not path.is_dir()
    if place == path and not place.is_dir():
        # Replaced as a whole, so that its folder counts.
        place = place.parent
    if is_special:
        reason = "a device or a pipe"
    elif place == path or not place.is_dir():
        reason = "Is a directory" if place == path else f"{place} is a file"
    elif os.access(place, os.W_OK | os.X_OK):
        return
    else:
        read_only = os.statvfs(place).f_flag & os.ST_RDONLY
        reason = os.strerror(errno.EROFS if read_only else errno.EACCES)
    raise ConfigError(
        f"{name} ({path}) must be a file that can be written ({reason}); name another one"
    )


def _check_replaced(
    parameters: Mapping[str, _Parameter], written: Mapping[str, Path], arguments: Mapping[str, Any]
) -> None:
    """Refuse to write to what the command reads, or two results to one file."""
    seen: dict[str, str] = {}
    for name, path in written.items():
        shown, suffix = parameters[name].shown, parameters[name].suffix
        real = os.path.realpath(path)
        if real in seen:
            raise ConfigError(f"{shown} ({path}) must not be {seen[real]} too; name another file")
        seen[real] = shown
        for other, value in arguments.items():
            ones = value if isinstance(value, list) else [value]
            if other != name and path.is_file() and any(_is_lost(real, output) for output in ones):
                raise ConfigError(
                    f"{shown} ({path}) must not replace {parameters[other].shown}, which is read, "
                    "or a part of it; name another file"
                )
        if path.is_file() and (path.suffix != suffix or suffix == _EDITED):
            raise ConfigError(
                f"{shown} ({path}) must not exist yet; use another name, or remove the file"
            )


def _is_lost(file: str, read: Any) -> bool:
    """True if replacing `file` would lose what a command reads: `read`, or a part of it."""
    if not isinstance(read, str | Path) or isinstance(read, ObjectPath):
        return False
    real = os.path.realpath(read)
    if isinstance(read, str) or not os.path.isdir(real):
        return file == real
    path = Path(file)
    return Path(real) in path.parents and is_record(path.name)


def _parameters(command: Callable[..., Any]) -> dict[str, _Parameter]:
    hints = typing.get_type_hints(command, include_extras=True)
    return {name: _parameter(name, hint) for name, hint in hints.items()}


def _parameter(name: str, hint: Any) -> _Parameter:
    extras = getattr(hint, "__metadata__", ())
    option = next((extra for extra in extras if type(extra).__name__ == "OptionInfo"), None)
    if option is None:
        return _Parameter(name.upper(), "")
    # Inside Annotated typer takes the first name for the default, and mends it later.
    words = (option.default, *(option.param_decls or ()))
    named = [word for word in words if isinstance(word, str) and word.startswith("--")]
    shown = named[0] if named else f"--{name.replace('_', '-')}"
    metavar = (option.metavar or "").strip("[]")
    is_file = shown in _WRITTEN and metavar.startswith("FILE")
    return _Parameter(shown, Path(metavar).suffix if is_file else "")
