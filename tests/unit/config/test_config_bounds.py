"""Configurations that somebody made to exhaust memory or time, and paths that are none."""

import re

import pytest

from moepp_megatron.config import Config, load_config
from moepp_megatron.config.paths import path_problem, place_problem
from moepp_megatron.config.schema import Section
from moepp_megatron.config.yaml_file import parse_yaml, read_mapping
from tests import ROOT
from tests.refusals import config_error, config_line, refusal

QUICKSTART = ROOT / "configs/quickstart.yaml"
HUGE = "99999999999999999999999"


def whole_numbers(model=Config, prefix=""):
    """Settings that may be a whole number or a list of them, and a huge one for each."""
    names = {}
    for name, field in model.model_fields.items():
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((a for a in inner if isinstance(a, type) and issubclass(a, Section)), None)
        if section is not None and field.annotation == list[section]:  # type: ignore[valid-type]
            continue
        if section is not None:
            names |= whole_numbers(section, f"{prefix}{name}.")
        elif int in inner or list[int] in inner:
            names[f"{prefix}{name}"] = f"[{HUGE}]" if list[int] in inner else HUGE
    return names


def test_every_whole_number_is_bounded():
    names = whole_numbers()
    assert len(names) > 60
    assert {"model.num_layers", "moe.layer_freq", "training.profile_steps"} <= names.keys()
    for name, value in names.items():
        told = refusal(load_config, QUICKSTART, [f"{name}={value}"]).splitlines()
        lines = [line for line in told if line.startswith(f"{name} (")]
        assert re.search(rf"{HUGE}\]?\) must be (at most|less than)", lines[0]), lines


def test_numbers_in_a_list_of_sections_are_bounded():
    rule = f"{{name: mine, metric: ffn_fraction, below: 0.2, for_steps: {HUGE}}}"
    with config_error(rf"^routing_guard.rules\[0\].for_steps \({HUGE}\) must be"):
        load_config(QUICKSTART, [f"routing_guard.rules=[{rule}]"])


def bomb(width, levels):
    lines = ["a0: &a0 [x]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        bomb(10, 30),
        "a: &a {x: 1}\n" + "\n".join(f"b{i}: {{<<: *a, y: *a}}" for i in range(5000)),
        "[" + "1, " * 30_000 + "]",
        "a: &a [*a]",
        "[" * 100 + "]" * 100,
    ],
    ids=["aliases", "merges", "values", "itself", "depth"],
)
def test_yaml_that_stands_for_too_much_is_refused(text, tmp_path):
    with config_line("not valid YAML"):
        parse_yaml(text, "file")
    (tmp_path / "bomb.yaml").write_text(text)
    with config_error(r"bomb\.yaml"):
        load_config(tmp_path / "bomb.yaml")


def test_too_many_values_are_refused_before_all_are_read():
    # What is wrong at the end would be reported otherwise.
    with config_error("more than 20000 values"):
        parse_yaml("[" + "1, " * 30_000 + "}", "file")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[" * 50_000, 1),
        ("{a: " * 30_000, 1),
        ("[ " * 500 + "a: ", 1),
        ("- " * 100_000, 1),
        ("? " * 100_000, 1),
        ("\n".join(" " * depth + "a:" for depth in range(700)), 65),
    ],
    ids=["brackets", "braces", "spaced", "dashes", "questions", "indents"],
)
def test_yaml_is_refused_where_it_gets_too_deep(text, line):
    # Not once all is read: PyYAML takes seconds for these, and ends at Python's own limit.
    with config_error(rf"line {line}: .*: nested more than 64 levels deep"):
        parse_yaml(text, "file")


@pytest.mark.parametrize("text", ["[" * 64 + "]" * 64, "- " * 63 + "x"])
def test_yaml_of_64_levels_is_read(text):
    value, depth = parse_yaml(text, "file"), 0
    while isinstance(value, list):
        value, depth = value[0] if value else None, depth + 1
    assert depth == text.count("[") + text.count("-")


def test_a_value_that_is_too_long_is_refused():
    # Of base 60: the time to read it grows with the square of its length.
    with config_error("a value has 200000 characters, more than 10000"):
        parse_yaml("a: " + "1:59" * 50_000, "file")
    assert parse_yaml("a" * 10_000, "file") == "a" * 10_000


def test_a_bomb_in_an_override_is_refused():
    # A few times too large, so that without a limit this fails within seconds, too.
    levels = ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 6))
    with config_error("values, aliases written out"):
        load_config(QUICKSTART, [f"training.profile_steps=[&a0 [1], {levels}]"])


def test_a_few_aliases_are_fine():
    assert parse_yaml("a: &a [1]\nb: [*a, *a]", "file") == {"a": [1], "b": [[1], [1]]}


def test_a_file_that_is_no_configuration_is_not_parsed(tmp_path):
    (tmp_path / "large.yaml").write_text("x" * 300_001)
    with config_error("must have at most 300000 characters"):
        read_mapping(tmp_path / "large.yaml")


PATHS = ["run.dir", "data.path", "data.tokenizer", "checkpoint.staging"]
PATHS += ["telemetry.hardware"]
PLACES = ["checkpoint.dir", "checkpoint.load"]


SCHEMES = ["gs", "hdfs", "file", "https"]


def refused_address(name, scheme):
    line = refusal(load_config, QUICKSTART, [f"{name}={scheme}://bucket/x"])
    assert line.startswith(start := f"{name} ('{scheme}://bucket/x') must be a path")
    return line.removeprefix(start)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("scheme", ["s3", *SCHEMES])
def test_an_address_is_no_path(name, scheme):
    rest = refused_address(name, scheme)
    assert rest.startswith(" of this machine, and")
    assert f"{scheme}:// is not supported; mount it" in rest
    assert "\n" not in rest


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_address_of_another_kind_is_no_place(name, scheme):
    assert refused_address(name, scheme).startswith(", s3://bucket/prefix or")


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("text", ["s3://bucket/x", "msc://profile/a/b", "a/b", "/a"])
def test_a_place_is_kept_as_it_is_written(name, text):
    config = load_config(QUICKSTART, [f"{name}={text}"])
    assert f"{name.split('.')[1]}: {text}\n" in config.to_yaml()


# AWS's secrets are base64, which half of them show by a slash.
@pytest.mark.parametrize("secret", ["hidden", "a/hidden+b", "a@hidden"])
@pytest.mark.parametrize("name", [*PATHS, *PLACES])
def test_a_password_is_refused_and_not_shown(name, secret):
    line = refusal(load_config, QUICKSTART, [f"{name}=s3://user:{secret}@bucket/x"])
    assert line.startswith(f"{name} ('s3://***@bucket/x') must ")
    assert "hidden" not in line


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("s3://bucket", "must name a bucket (or profile) and a prefix"),
        ("s3:///x", "must name a bucket (or profile) and a prefix"),
        ("s3:bucket/x", "must have two slashes after the colon"),
        ("msc://profile/", "must name a bucket (or profile) and a prefix"),
        ("s3://bucket/a?versionId=1", "must hold no space"),
        ("s3://bucket/a/../b", "must hold no space"),
        ("s3://bucket/$USER/x", "must be written out"),
        ("n" * 256, "at most 255 bytes"),
    ],
)
def test_what_is_no_place(text, rule):
    problem = place_problem(text)
    assert problem.rule.startswith(rule) or rule in problem.rule


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("n" * 256, "at most 255 bytes"),
        ("\u00e4" * 128, "at most 255 bytes"),
        ("$SCRATCH/x", "must be written out"),
        ("/a/${SCRATCH}_b", "must be written out"),
        ("a/" * 2048, "4095 in all"),
        ("a\0b", "no zero byte"),
        ("a\udcff", "in UTF-8"),
        ("s3:/bucket", "s3:// is not supported"),
    ],
)
def test_what_is_no_path(text, rule):
    problem = path_problem(text)
    assert rule in problem.rule


@pytest.mark.parametrize(
    "text", ["a", "/a/b", "~/a", "a:b", "x:/y", "n" * 255, "./s3://x", "10:20"]
)
def test_what_is_a_path(text):
    assert path_problem(text) is None
