"""Rules of blends, stages and validation sets, and where stages begin."""

from pathlib import Path

from moepp_megatron.config import check_config, load_config
from moepp_megatron.config.blends import blend_at, blends_of, labels, with_whole_paths

A, B = "{path: data/a, weight: 3}", "{path: data/b, weight: 1}"
BLEND = f"data.blend=[{A}, {B}]"
STAGE = f"blend: [{B}]"


def test_stages_begin_at_whole_steps(minimal):
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


def test_a_folder_without_weight_is_left_out(minimal):
    config = load_config(minimal, [f"data.blend=[{A}, {{path: data/c, weight: 0}}]"])
    assert [str(folder.path) for folder in blends_of(config)[0].folders] == ["data/a"]


def test_validation_sets_need_no_validation_part(minimal):
    config = load_config(minimal, [BLEND, "data.split='1,0,0'", "data.validation={web: data/v}"])
    check_config(config)
    assert config.data.validation == {"web": Path("data/v")}


def test_labels():
    assert labels([Path("x/web"), Path("x/code")]) == ["web", "code"]
    assert labels([Path("x/web"), Path("y/web"), Path("c")]) == ["x/web", "y/web", "c"]


def test_whole_paths(minimal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stages = f"data.stages=[{{from_step: 5, {STAGE}}}]"
    config = load_config(minimal, [BLEND, stages, "data.validation={v: data/v}"])
    data = with_whole_paths(config.data)
    assert [part.path for part in data.blend] == [tmp_path / "data/a", tmp_path / "data/b"]
    assert data.stages[0].blend[0].path == tmp_path / "data/b"
    assert data.validation == {"v": tmp_path / "data/v"}
    assert data.path is None
