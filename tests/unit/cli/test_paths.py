"""An address such as s3://bucket is no path, on whichever place of a command line."""

import enum
import inspect
import os
import typing
from pathlib import Path

import pytest
import typer

from moepp_megatron.cli import main
from moepp_megatron.runtime.object_store import place

ADDRESS = "s3://bucket/x"
# As a Path holds it, which keeps one slash.
HELD = "s3:/bucket/x"


def _commands(command, path=()):
    inner = getattr(command, "commands", None)
    if inner is None:
        yield path, command
    for name, one in (inner or {}).items():
        yield from _commands(one, (*path, name))


def _types(command, parameter):
    """Return the types of a parameter: of `Path | None` or `list[Path]`, Path and the rest."""
    hint = typing.get_type_hints(inspect.unwrap(command.callback))[parameter.name]
    return {hint, *typing.get_args(hint)}


def _is_path(command, parameter):
    return Path in _types(command, parameter)


def _may_be_far(command, parameter):
    """True for the place of a checkpoint, which may be in object storage."""
    function = inspect.unwrap(command.callback)
    hint = typing.get_type_hints(function, include_extras=True)[parameter.name]
    return any(getattr(one, "parser", None) is place for one in typing.get_args(hint))


# Every place that takes a path: the words that lead to it, and the command.
PLACES = [
    (path, parameter, command)
    for path, command in _commands(typer.main.get_command(main.app))
    for parameter in command.params
    if parameter.name != "help"
    and _is_path(command, parameter)
    and not _may_be_far(command, parameter)
]


def _value(command, parameter, folder):
    """Some value that the command line takes."""
    if _is_path(command, parameter):
        return str(folder / "x")
    for one in _types(command, parameter):
        if isinstance(one, enum.EnumType):
            return next(iter(one)).value
    return "1"


def _words(place, command, value, folder):
    """A command line with `value` at a place, and what the command cannot do without."""
    options = []
    arguments = []
    for parameter in command.params:
        if parameter is not place and not parameter.required:
            continue
        given = value if parameter is place else _value(command, parameter, folder)
        if parameter.param_type_name == "argument":
            arguments.append(given)
        else:
            # doctor takes --json without a file, so that a word after it may be CONFIG.
            options.append(f"{parameter.opts[0]}={given}")
    return [*options, *arguments]


def test_the_walk_has_found_the_places():
    found = {(" ".join(path), parameter.name) for path, parameter, _ in PLACES}
    assert len(found) > 40
    assert {("train", "config"), ("data prepare", "out"), ("inspect", "text")} <= found
    assert {("convert hf-to-mcore", "source"), ("monitor", "run"), ("doctor", "json_file")} <= found


@pytest.mark.parametrize(
    ("path", "place", "command"),
    PLACES,
    ids=[f"{' '.join(path)} {place.name}" for path, place, _ in PLACES],
)
def test_an_address_is_refused(path, place, command, tmp_path, monkeypatch, moepp):
    monkeypatch.chdir(tmp_path)
    words = _words(place, command, ADDRESS, tmp_path)
    code, _, err = moepp(*path, *words)
    assert code == 2
    assert f"('{HELD}') must be a path of this machine, and s3:// is not supported" in err
    name = place.name.upper() if place.param_type_name == "argument" else place.opts[0]
    assert err.startswith(f"error: {name} ("), err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["monitor", "--prometheus", "9400", "runs", ADDRESS],
        ["train", "x.yaml", "run.dir=s3://bucket/x"],
    ],
    ids=["second run", "setting"],
)
def test_also_among_others(words, tmp_path, monkeypatch, moepp):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text("{}")
    code, _, err = moepp(*words)
    assert code == 2
    assert "bucket/x') must be a path of this machine, and s3:// is not supported" in err
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "s3://user:a/hidden@bucket/x", "--prompt", "a"],
        ["score", "s3://user:hidden@bucket/x", "--text", "a"],
        ["inspect", "s3://user:hidden@bucket/x", "--text", "a"],
        ["convert", "mcore-to-hf", "s3://user:hidden@bucket/x", "out"],
    ],
    ids=lambda words: words[0],
)
def test_a_checkpoint_may_be_far_but_tells_no_password(words, tmp_path, monkeypatch, moepp):
    monkeypatch.chdir(tmp_path)
    code, _, err = moepp(*words)
    assert code == 2
    assert "('s3://***@bucket/x') must not hold a user or password" in err
    assert "hidden" not in err
    assert err.count("\n") == 1


def test_a_path_that_looks_alike_is_one(tmp_path, moepp):
    code, _, err = moepp("report", str(tmp_path / "s3:/bucket"))
    assert code == 2
    assert "s3:/bucket: is not a folder" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("config show x.yaml --json x.yaml", "--json (x.yaml) must not replace CONFIG"),
        ("config show x.yaml --json link.json", "--json (link.json) must not replace CONFIG"),
        ("plan x.yaml --gpu gpu.yaml --json gpu.yaml", "must not replace --gpu"),
        ("report run --out run/metrics.jsonl", "--out (run/metrics.jsonl) must not replace RUN"),
        ("report run --out run/status.json", "--out (run/status.json) must not replace RUN"),
        ("report other run --out run/config.yaml", "must not replace RUN"),
        # Nothing that may have been edited, and no result of another kind.
        ("config from-megatron x.txt --out x.yaml", "(x.yaml) must not exist yet; use another"),
        ("plan x.yaml --out gpu.yaml", "--out (gpu.yaml) must not exist yet"),
        ("plan x.yaml --json x.txt", "--json (x.txt) must not exist yet"),
        ("report run --out gpu.yaml", "--out (gpu.yaml) must not exist yet"),
        ("report run --out run/notes.md", "--out (run/notes.md) must not exist yet"),
        ("report run --out run/metadata.json", "must not replace RUN"),
        ("report run --out run/rank_00000.json", "must not replace RUN"),
        ("score run --text x.txt --out x.txt", "--out (x.txt) must not replace --text"),
        ("plan x.yaml --out new --json ./new", "(new) must not be --json too"),
        ("report run --out pipe", "(a device or a pipe); name another one"),
    ],
)
def test_what_is_read_is_not_replaced(words, said, tmp_path, monkeypatch, moepp):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    names = ["x.yaml", "x.txt", "gpu.yaml", "run/metrics.jsonl", "run/status.json"]
    more = ["run/config.yaml", "run/metadata.json", "run/rank_00000.json", "run/notes.md"]
    files = [tmp_path / name for name in [*names, *more]]
    for file in files:
        file.write_text("kept")
    (tmp_path / "link.json").symlink_to("x.yaml")
    os.mkfifo(tmp_path / "pipe")
    code, _, err = moepp(*words.split())
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert {file.read_text() for file in files} == {"kept"}
    assert (tmp_path / "pipe").is_fifo()


def test_results_of_before_are_replaced(tmp_path, monkeypatch, moepp):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.html").touch()
    code, _, err = moepp("report", ".", "--out", "mine.html")
    assert (code, "config.yaml: cannot be read" in err) == (2, True)


def test_each_file_that_is_written_has_a_kind():
    for path, parameter, _ in PLACES:
        metavar = (parameter.metavar or "").strip("[]")
        if {"--out", "--json"} & {*parameter.opts} and "FILE" in metavar:
            assert Path(metavar).suffix, (path, parameter.opts)
