"""Every path of the command line is checked in one place, before a command sees it.

So is `--json -`, which prints.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from moepp_megatron.cli.echo import echo
from moepp_megatron.config import ConfigError, UnfitError
from moepp_megatron.config.paths import path_problem, place_problem
from moepp_megatron.config.problem import Problem
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


def _checked(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def call(**arguments: Any) -> Any:
        for name, value in arguments.items():
            for one in value if isinstance(value, list) else [value]:
                is_far = isinstance(one, ObjectPath)
                check = place_problem if is_far else path_problem
                problem = check(str(one)) if isinstance(one, Path) else None
                if problem is not None:
                    shown = Problem(_shown(command, name), str(one), problem.rule, problem.remedy)
                    raise ConfigError(str(shown))
            if isinstance(value, Path) and value != _STDOUT and _written(command, name):
                _check_writable(_shown(command, name), value)
        _check_replaced(command, arguments)
        printed = [
            n for n, v in arguments.items() if v == _STDOUT and _shown(command, n) == "--json"
        ]
        with contextlib.ExitStack() as stack:
            for name in printed:
                arguments[name] = stack.enter_context(printed_file())
            return command(**arguments)

    return call


@contextlib.contextmanager
def printed_file() -> Iterator[Path]:
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


def _check_replaced(command: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Refuse to write to what the command reads, or two results to one file."""
    seen: dict[str, str] = {}
    for name, path in arguments.items():
        if not isinstance(path, Path) or path == _STDOUT or not _written(command, name):
            continue
        shown, real = _shown(command, name), os.path.realpath(path)
        if real in seen:
            raise ConfigError(f"{shown} ({path}) must not be {seen[real]} too; name another file")
        seen[real] = shown
        for other, value in arguments.items():
            ones = value if isinstance(value, list) else [value]
            if other != name and path.is_file() and any(_is_lost(real, output) for output in ones):
                raise ConfigError(
                    f"{shown} ({path}) must not replace {_shown(command, other)}, which is read, "
                    "or a part of it; name another file"
                )
        kind = _written(command, name)
        if path.is_file() and (path.suffix != kind or kind == _EDITED):
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


def _written(command: Callable[..., Any], name: str) -> str:
    """The suffix of the file that an option writes; empty where it writes none."""
    metavar = getattr(_option(command, name), "metavar", None) or ""
    is_file = _shown(command, name) in _WRITTEN and metavar.strip("[]").startswith("FILE")
    return Path(metavar.strip("[]")).suffix if is_file else ""


def _option(command: Callable[..., Any], name: str) -> Any:
    """Find typer's option; None for an argument."""
    hint = typing.get_type_hints(command, include_extras=True)[name]
    extras = getattr(hint, "__metadata__", ())
    return next((extra for extra in extras if type(extra).__name__ == "OptionInfo"), None)


def _shown(command: Callable[..., Any], name: str) -> str:
    """Name a parameter as users do: --out, or CHECKPOINT."""
    option = _option(command, name)
    if option is None:
        return name.upper()
    # Inside Annotated typer takes the first name for the default, and mends it later.
    words = (option.default, *(option.param_decls or ()))
    named = [word for word in words if isinstance(word, str) and word.startswith("--")]
    return named[0] if named else f"--{name.replace('_', '-')}"
