"""Rules of blends, stages and validation sets, and where stages begin."""

from pathlib import Path

import pytest

from moepp_megatron.config import ConfigError, check_config, load_config
from moepp_megatron.config.blends import blend_at, blends_of, labels, with_whole_paths

A, B = "{path: data/a, weight: 3}", "{path: data/b, weight: 1}"
BLEND = f"data.blend=[{A}, {B}]"
STAGE = f"blend: [{B}]"

INVALID = [
    ([BLEND, "data.path=data/a"], "data.blend", "must be empty where data.path (data/a) is set"),
    ([f"data.stages=[{{from_step: 5, {STAGE}}}]"], "data.stages", "set data.path or data.blend"),
    (["data.blend=[{path: a, weight: -1}]"], "data.blend[0].weight (-1)", "use 0 or more"),
    (["data.blend=[{path: a, weight: 0}]"], "data.blend ([0.0])", "use [{path: DIR, weight: 1}]"),
    (["data.blend=[{path: a}]"], "data.blend[0].weight (missing)", "must be given"),
    ([f"data.blend=[{A}, {A}]"], "data.blend[1].path ('data/a')", "add its weight"),
    (
        ["data.blend=[{path: data/a, weight: 1}, {path: data/../data/a, weight: 1}]"],
        "data.blend[1].path",
        "must be another folder than those before it",
    ),
    (
        [BLEND, f"data.stages=[{{{STAGE}}}]"],
        "data.stages[0] ({'from_step': None, 'from_tokens': None})",
        "must have one of from_step and from_tokens",
    ),
    (
        [BLEND, f"data.stages=[{{from_step: 5, from_tokens: 1e6, {STAGE}}}]"],
        "data.stages[0]",
        "keep one of them",
    ),
    (
        [
            BLEND,
            f"data.stages=[{{from_step: 5, {STAGE}}}]",
            "training.batch_ramp=[[0, 8], [1280, 16]]",
        ],
        "training.batch_ramp ([[0, 8], [1280, 16]])",
        "leave out one of the two",
    ),
    (
        [BLEND, f"data.stages=[{{from_step: 50, {STAGE}}}, {{from_step: 50, {STAGE}}}]"],
        "data.stages[1].from_step (50)",
        "must begin after step 50",
    ),
    # 20,480 tokens are 10 steps of 16 sequences of 128 tokens.
    (
        [BLEND, f"data.stages=[{{from_step: 10, {STAGE}}}, {{from_tokens: 20480, {STAGE}}}]"],
        "data.stages[1].from_tokens (20480.0)",
        "put the stages in order",
    ),
    (
        [BLEND, "data.stages=[{from_step: 5, blend: [{path: a, weight: 0}]}]"],
        "data.stages[0].blend ([0.0])",
        "at least one folder with a weight above 0",
    ),
    (
        [BLEND, "data.stages=[{from_step: 5, blend: [{path: a, weight: x}]}]"],
        "data.stages[0].blend[0].weight ('x')",
        "must be a number",
    ),
    (
        [BLEND, "data.stages=[{from_step: 5, blend: [{path: a, wieght: 1, weight: 2}]}]"],
        "data.stages[0].blend[0].wieght (1)",
        "did you mean weight?",
    ),
    (["data.validation={web: 3}"], "data.validation", "must be"),
    (["data.split='1,0,0'", BLEND], "data.split ('1,0,0')", "name sets in data.validation"),
]


@pytest.mark.parametrize(("overrides", "name", "remedy"), INVALID)
def test_refused(minimal: Path, overrides: list[str], name: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(minimal, overrides)
    (line,) = str(error.value).splitlines()
    assert line.startswith(name), line
    assert remedy in line


def test_stages_begin_at_whole_steps(minimal: Path) -> None:
    stages = f"data.stages=[{{from_tokens: 20481, {STAGE}}}, {{from_step: 12, {STAGE}}}]"
    config = load_config(minimal, [BLEND, stages])
    blends = blends_of(config)
    assert [blend.first_sample for blend in blends] == [0, 11 * 16, 12 * 16]
    assert [folder.share for folder in blends[0].folders] == [0.75, 0.25]
    at = [blend_at(blends, samples).name for samples in (0, 175, 176, 191, 192, 10**9)]
    names = ["data.blend", "data.stages[0]", "data.stages[1]"]
    assert at == [names[0], names[0], names[1], names[1], names[2], names[2]]
    # A file that a run writes describes the same.
    assert blends_of(type(config).model_validate(config.model_dump())) == blends


def test_a_folder_without_weight_is_left_out(minimal: Path) -> None:
    config = load_config(minimal, [f"data.blend=[{A}, {{path: data/c, weight: 0}}]"])
    assert [str(folder.path) for folder in blends_of(config)[0].folders] == ["data/a"]


def test_a_stage_behind_the_end_has_no_effect(minimal: Path) -> None:
    stages = f"data.stages=[{{from_step: 100, {STAGE}}}]"
    config = load_config(minimal, [BLEND, stages])
    (warning,) = [line for line in check_config(config) if "stages" in line]
    assert "data.stages[0] ('from step 100') has no effect" in warning


def test_validation_sets_need_no_validation_part(minimal: Path) -> None:
    config = load_config(minimal, [BLEND, "data.split='1,0,0'", "data.validation={web: data/v}"])
    check_config(config)
    assert config.data.validation == {"web": Path("data/v")}


def test_labels() -> None:
    assert labels([Path("x/web"), Path("x/code")]) == ["web", "code"]
    assert labels([Path("x/web"), Path("y/web"), Path("c")]) == ["x/web", "y/web", "c"]


def test_whole_paths(minimal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stages = f"data.stages=[{{from_step: 5, {STAGE}}}]"
    config = load_config(minimal, [BLEND, stages, "data.validation={v: data/v}"])
    data = with_whole_paths(config.data)
    assert [part.path for part in data.blend] == [tmp_path / "data/a", tmp_path / "data/b"]
    assert data.stages[0].blend[0].path == tmp_path / "data/b"
    assert data.validation == {"v": tmp_path / "data/v"}
    assert data.path is None
