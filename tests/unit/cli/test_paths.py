"""An address such as s3://bucket is no path, on whichever place of a command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from moepp_megatron.cli import main

ADDRESS = "s3://bucket/x"


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield path, command
    for name, one in (inner or {}).items():
        yield from _commands(one, (*path, name))


def _is_path(parameter: Any) -> bool:
    return parameter.type.name in ("path", "file", "directory")


# Every place that takes a path: the words that lead to it, and the command.
PLACES = [
    (path, parameter, command)
    for path, command in _commands(typer.main.get_command(main.app))
    for parameter in command.params
    if _is_path(parameter)
]


def _value(parameter: Any, folder: Path) -> str:
    """Some value that the command line takes."""
    if _is_path(parameter):
        return str(folder / "x")
    choices = getattr(parameter.type, "choices", None)
    return next(iter(choices)) if choices else "1"


def _words(place: Any, command: Any, value: str, folder: Path) -> list[str]:
    """A command line with `value` at a place, and what the command cannot do without."""
    options, arguments = [], []
    for parameter in command.params:
        if parameter is not place and not parameter.required:
            continue
        given = value if parameter is place else _value(parameter, folder)
        if parameter.param_type_name == "argument":
            arguments.append(given)
        else:
            options += [parameter.opts[0], given]
    return [*options, *arguments]


def _run(words: list[str], monkeypatch, capsys) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["moepp", *words])
    with pytest.raises(SystemExit) as ended:
        main.run()
    return int(ended.value.code or 0), capsys.readouterr().err


def test_the_walk_has_found_the_places():
    found = {(" ".join(path), parameter.name) for path, parameter, _ in PLACES}
    assert len(found) > 40
    assert {("train", "config"), ("data prepare", "out"), ("generate", "checkpoint")} <= found
    assert {("convert hf-to-mcore", "source"), ("monitor", "run"), ("doctor", "out")} <= found


@pytest.mark.parametrize(
    ("path", "place", "command"),
    PLACES,
    ids=[f"{' '.join(path)} {place.name}" for path, place, _ in PLACES],
)
def test_an_address_is_refused(path, place, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = _words(place, command, ADDRESS, tmp_path)
    code, err = _run([*path, *words], monkeypatch, capsys)
    assert code == 2
    assert f"('{ADDRESS}') must be a path of this machine, and s3:// is not supported" in err
    name = place.name.upper() if place.param_type_name == "argument" else place.opts[0]
    assert err.startswith(f"error: {name} ("), err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["monitor", "--prometheus", "9400", "runs", ADDRESS],
        ["data", "prepare", "stdlib", ADDRESS, "--out", "data"],
        ["train", "x.yaml", "run.dir=s3://bucket/x"],
    ],
    ids=["second run", "second source", "setting"],
)
def test_also_among_others(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text("{}")
    code, err = _run(words, monkeypatch, capsys)
    assert code == 2
    assert f"('{ADDRESS}') must be a path of this machine" in err
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


def test_a_path_that_looks_alike_is_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, err = _run(["report", "./s3://bucket/x"], monkeypatch, capsys)
    assert code == 2
    assert "s3:/bucket/x: is not a folder" in err
