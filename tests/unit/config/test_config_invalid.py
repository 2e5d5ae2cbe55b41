"""Every wrong configuration gives its own message: name with value, and remedy."""

from pathlib import Path
from string import Template

import pytest

from moepp_megatron.config import (
    Layout,
    check_config,
    check_world_size,
    checks,
    load_config,
)
from moepp_megatron.config.sections import declared
from tests.refusals import config_error, config_line, refusal

Case = tuple[list[str], str, str]


def read_cases(path):
    """The rows of each section: overrides, how the message begins, what else it holds."""
    names = {}
    cases = {}
    for line in path.read_text().splitlines():
        text = Template(line).substitute(names)
        if text.startswith("["):
            section = text.strip("[]")
        elif text and not text.startswith("#") and section == "names":
            name, _, value = text.partition(": ")
            names[name] = value
        elif text and not text.startswith("#"):
            overrides, told = text.split(" => ")
            begins, holds = told.split(" | ")
            cases.setdefault(section, []).append((overrides.split(" & "), begins, holds))
    return cases


CASES = read_cases(Path(__file__).with_name("wrong_settings.txt"))
INVALID, IGNORED = CASES["invalid"], CASES["ignored"]
INVALID_WORLD_SIZE = [
    (overrides, int(ranks.removesuffix(" ranks")), begins, holds)
    for (ranks, *overrides), begins, holds in CASES["invalid on so many ranks"]
]


@pytest.mark.parametrize(("overrides", "name_and_value", "remedy"), INVALID)
def test_invalid_setting(minimal, overrides, name_and_value, remedy):
    message = refusal(load_config, minimal, overrides)
    assert len(message.splitlines()) == 1, "one mistake gives one line"
    assert message.startswith(name_and_value)
    assert remedy in message.removeprefix(name_and_value)


def test_a_rule_that_is_dropped_needs_no_metric(minimal):
    off = "observe.health_interval=0"
    load_config(minimal, [off, "routing_guard.rules=[{name: logit_explosion, action: none}]"])
    with config_error("must be measured"):
        load_config(minimal, [off, "routing_guard.rules=[{name: logit_explosion}]"])


@pytest.mark.parametrize(
    ("overrides", "world_size", "name_and_value", "remedy"), INVALID_WORLD_SIZE
)
def test_invalid_world_size(minimal, overrides, world_size, name_and_value, remedy):
    config = load_config(minimal, overrides)
    for check in (check_world_size, Layout.from_config):
        message = refusal(check, config, world_size)
        assert len(message.splitlines()) == 1
        assert message.startswith(name_and_value)
        assert remedy in message.removeprefix(name_and_value)


def test_every_rule_is_broken_by_a_case_above(minimal, monkeypatch):
    broken = set()

    def recording(rule):
        def recorded(*args):
            for problem in rule(*args):
                broken.add(rule)
                yield problem

        return recorded

    for name in ("RULES", "IGNORED", "WORLD_SIZE_RULES"):
        monkeypatch.setattr(checks, name, tuple(map(recording, getattr(checks, name))))
    for overrides, *_ in INVALID:
        refusal(load_config, minimal, overrides)
    for overrides, world_size, *_ in INVALID_WORLD_SIZE:
        refusal(check_world_size, load_config(minimal, overrides), world_size)
    for overrides, *_ in IGNORED:
        check_config(load_config(minimal, overrides))
    # Of what excludes each other, some stand for all.
    rows = {*declared("own_rules"), *declared("no_effect"), *declared("world_size_rules")}
    assert rows - broken == set()


# (text of the file, fragments of the message)
INVALID_FILES = [
    ("", ["bad.yaml", "is empty", "write sections"]),
    ("# only a comment\n", ["bad.yaml", "is empty"]),
    ("- a\n- b\n", ["bad.yaml", "not a list", "write sections"]),
    ("just text\n", ["bad.yaml", "not a single value"]),
    ("model:\n  num_layers: [1\n", ["bad.yaml, line 3", "not valid YAML"]),
    ("model:\n\tnum_layers: 1\n", ["bad.yaml, line 2", "not valid YAML"]),
    ("moe:\n  tau: 1.0\n  tau: 0.5\n", ["bad.yaml, line 3", "'tau' is given twice", "line 2"]),
    ("moe: {}\nmoe: {}\n", ["bad.yaml, line 2", "'moe' is given twice"]),
    ("run: {dir: !!python/object/apply:os.system [ls]}\n", ["bad.yaml, line 1", "not valid YAML"]),
    ("run: {name: 2024-99-99}\n", ["bad.yaml", "not valid YAML"]),
    ("a: &a [*a]\n", ["bad.yaml, line 1", "contains itself"]),
    ("moe: &m {x: *m}\n", ["bad.yaml, line 1", "contains itself"]),
    ("moe: 3\n", ["moe must be a mapping", "write moe: with indented keys"]),
    ("moe: [tau]\n", ["moe must be a mapping", "write moe: with indented keys"]),
    ("1: {}\n", ["unknown section 1"]),
    ("? [a, b]\n: 1\n", ["bad.yaml"]),
    ("moe: {on: 1}\n", ["unknown key moe.True"]),
    ("base: [a, b]\n", ["base (['a', 'b'])", "write base: other.yaml"]),
    ("base: nowhere.yaml\n", ["base ('nowhere.yaml')", "give a path relative"]),
    ('base: "a\\0b"\n', ["base ('a\\x00b')", "give a path relative"]),
    ("base: .\n", ["cannot be read", "give a readable file"]),
    ("base: bad.yaml\n", ["goes in a circle", "bad.yaml -> ", "remove one"]),
    ("[" * 10_000, ["bad.yaml"]),
    ("a\0b", ["bad.yaml", "not valid YAML"]),
]


@pytest.mark.parametrize(("text", "fragments"), INVALID_FILES)
def test_invalid_file(tmp_path, text, fragments):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = refusal(load_config, path)
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("none.yaml", r"none\.yaml: no such file; check the path"),
        (".", r"cannot be read \(Is a directory\)"),
        ("binary.yaml", "must be UTF-8 text"),
        ("a\0b", "cannot be read"),
        ("x" * 5000, "cannot be read"),
    ],
    ids=["none", "folder", "bytes", "zero byte", "long"],
)
def test_what_is_no_file_of_text(tmp_path, name, told):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with config_error(told):
        load_config(tmp_path / name)


def test_home_of_an_unknown_user_is_no_crash(minimal):
    config = load_config(minimal, ["run.dir=~no-such-user-here/run"])
    assert str(config.run.dir) == "~no-such-user-here/run"


def test_every_missing_field_is_named(tmp_path):
    path = tmp_path / "little.yaml"
    path.write_text("moe:\n")
    lines = refusal(load_config, path).splitlines()
    assert len(lines) == 11
    assert lines[1].startswith("model.num_layers (missing) must be given: Transformer layers")
    assert "pass model.num_layers=VALUE" in lines[1]


@pytest.mark.parametrize("setting", ["run: {dir: 2024}", "slurm: {time: 4:00:00}"])
def test_text_of_a_file_is_quoted(minimal, setting):
    path = minimal.with_name("numbers.yaml")
    path.write_text(f"base: {minimal.name}\n{setting}\nmoe: {{router_topk: 99}}\n")
    with config_line("put it in quotes"):
        load_config(path)


@pytest.mark.parametrize("text", ["4:00:00", "120", "0123", "2-00:00:00", "1e3", "2024-01-01"])
def test_text_of_the_command_line_is_what_was_typed(minimal, text):
    assert load_config(minimal, [f"run.name={text}"]).run.name == text
    assert str(load_config(minimal, [f"run.dir={text}"]).run.dir) == text
    assert load_config(minimal, ["slurm.time=null"]).slurm.time is None


def test_every_mistake_has_its_line(minimal):
    wrong = ["moe.router_topk=99", "optimizer.min_lr=1.0", "data.split='1'"]
    names = [line.split()[0] for line in refusal(load_config, minimal, wrong).splitlines()]
    assert names == ["moe.router_topk", "data.split", "optimizer.min_lr"], "in the file's order"


def test_message_stays_on_one_line_whatever_the_value(minimal):
    message = refusal(load_config, minimal, ['moe.dispatcher="a\\nb' + "x" * 500 + '"'])
    assert len(message.splitlines()) == 1
    assert len(message) < 200


@pytest.mark.parametrize(("overrides", "name_and_value", "reason"), IGNORED)
def test_ignored_setting_is_reported(minimal, overrides, name_and_value, reason):
    (warning,) = check_config(load_config(minimal, overrides))
    assert warning.startswith(name_and_value)
    assert reason in warning


def test_overlap_on_one_rank_is_reported(minimal):
    config = load_config(minimal, ["parallel.overlap_grad_reduce=true"])
    (warning,) = check_world_size(config, 1)
    assert warning.startswith("parallel.overlap_grad_reduce (true) has no effect with one")
    assert check_world_size(config, 2) == []
