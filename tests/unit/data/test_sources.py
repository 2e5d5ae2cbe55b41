import os
import shutil
import sysconfig
from pathlib import Path

import pytest

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.data.sources import content_fingerprint, resolve_sources, stat_fingerprint


def names(source) -> list[str]:
    return [file.name for file in source.files]


def test_folder_is_walked_in_sorted_order_without_hidden_files(tmp_path: Path):
    for name in ("b.txt", "a/z.md", "a/b.py", ".hidden", ".git/config", "c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (source,) = resolve_sources([str(tmp_path)])
    assert names(source) == ["a/b.py", "a/z.md", "b.txt", "c.jsonl"]
    assert [file.format for file in source.files] == ["text", "text", "text", "jsonl"]


def test_output_folder_within_a_source_is_left_out(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    (source,) = resolve_sources([str(tmp_path)], exclude=tmp_path / "out")
    assert names(source) == ["a.txt"]


def test_pipe_in_a_folder_is_not_opened(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    (source,) = resolve_sources([str(tmp_path)])
    assert names(source) == ["a.txt"]


def test_stdlib_is_this_pythons_library():
    (source,) = resolve_sources(["stdlib"])
    assert "json/decoder.py" in names(source)
    assert names(source) == sorted(names(source))
    assert all(name.endswith(".py") and "-packages/" not in name for name in names(source))
    assert source.files[0].path.is_relative_to(sysconfig.get_path("stdlib"))
    assert source.size > 5e6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.mkdir(), "holds no files"),
        (lambda path: path.write_text(""), r"is empty \(0 bytes\)"),
        (os.mkfifo, "neither a file nor a folder"),
    ],
    ids=["missing", "no files", "empty", "pipe"],
)
def test_unusable_source_is_named(tmp_path: Path, make, message: str):
    path = tmp_path / "the-source"
    make(path)
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_sources([str(path)])
    assert "the-source" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dangling_link_in_a_folder_is_an_error(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"gone\.txt cannot be read"):
        resolve_sources([str(tmp_path)])


def test_unreadable_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.txt"
    path.write_text("x")
    sources = resolve_sources([str(path)])

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    # chmod would not stop root, which tests in containers often are.
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=r"a\.txt cannot be read \(Permission denied\)"):
        content_fingerprint(sources)


def test_no_source_is_an_error():
    with pytest.raises(ConfigError, match="SOURCE is missing"):
        resolve_sources([])


def test_empty_name_is_not_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "private.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"SOURCE \(''\) must not be empty; name a file"):
        resolve_sources([""])


def test_fingerprints_see_content_and_name(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    os.utime(path, ns=(0, 0))
    first = resolve_sources([str(path)])
    os.utime(path, ns=(0, 1))
    touched = resolve_sources([str(path)])
    path.write_text("two")
    os.utime(path, ns=(0, 0))
    changed = resolve_sources([str(path)])

    assert stat_fingerprint(first) != stat_fingerprint(touched)
    assert stat_fingerprint(first) == stat_fingerprint(changed)
    after = content_fingerprint(changed)
    path.write_text("one")
    assert content_fingerprint(first) == content_fingerprint(touched) != after


def test_what_has_been_prepared_is_no_text(prepared: Path, tmp_path: Path):
    shutil.copytree(prepared, tmp_path / "texts" / "old")
    for source in (tmp_path / "texts", tmp_path / "texts" / "old"):
        with pytest.raises(
            ConfigError, match=r"texts/old must be text, and is a folder that moepp"
        ):
            resolve_sources([str(source)])
    (tmp_path / "texts" / "new.txt").write_text("text")
    (source,) = resolve_sources([str(tmp_path / "texts")], exclude=tmp_path / "texts" / "old")
    assert names(source) == ["new.txt"]
