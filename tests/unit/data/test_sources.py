import os
import shutil
import sysconfig
from pathlib import Path

import pytest

from moepp_megatron.data.sources import content_fingerprint, resolve_sources, stat_fingerprint
from tests.refusals import config_error, config_line


def names(source):
    return [file.name for file in source.files]


def test_folder_is_walked_in_sorted_order_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b.py", ".hidden", ".git/config", "c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (source,) = resolve_sources([str(tmp_path)])
    assert names(source) == ["a/b.py", "a/z.md", "b.txt", "c.jsonl"]
    assert [file.format for file in source.files] == ["text", "text", "text", "jsonl"]


@pytest.mark.parametrize("out", ["texts", "texts/out", "texts/a/b", "link/out", "other/../texts/o"])
def test_output_in_a_source_is_refused(tmp_path, out):
    """It would be a part of the source for every later call."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("x")
    (tmp_path / "link").symlink_to("texts")
    for source in ("texts", "link"):
        with config_line(r"--out .* must not lie in the source"):
            resolve_sources([str(tmp_path / source)], tmp_path / out)
    resolve_sources([str(tmp_path / "texts")], tmp_path / "texts2")
    resolve_sources([str(tmp_path / "texts/a.txt")], tmp_path / "texts/out")


# What lies in a source, and where it leads.
LINKS = {
    "file": ("a.txt", "../secret/key"),
    "absolute": ("a.txt", "/etc/passwd"),
    "folder": ("sub", "../secret"),
    "archive": ("a.jsonl.gz", "../secret/key.gz"),
    "table": ("a.parquet", "../secret/key"),
    "in a folder": ("x/y/a.txt", "../../../secret/key"),
    "link to a link": ("a.txt", "../hop"),
    "link to a link in the source": ("a.txt", ".hop"),
    "through a link to a folder": ("a.txt", "sub/key"),
    "around": ("a.txt", "../texts2/key"),
}


@pytest.mark.parametrize("kind", LINKS)
def test_links_that_leave_a_source_are_refused(tmp_path, kind):
    name, target = LINKS[kind]
    for folder in ("secret", "texts2", "texts"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "key").write_text("private")
    (tmp_path / "secret/key.gz").write_text("private")
    (tmp_path / "hop").symlink_to("secret/key")
    root = tmp_path / "texts"
    (root / ".hop").symlink_to("../secret/key")
    link = root / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)
    if "sub" in target:
        (root / "sub").symlink_to("../secret")
    for source in (str(root), f"mine={root}", f"{root}/../texts"):
        with config_error(r"must not be a link that leaves the source"):
            resolve_sources([source])


def test_links_within_a_source_and_those_that_a_user_names_are_followed(tmp_path):
    (tmp_path / "texts/sub").mkdir(parents=True)
    (tmp_path / "texts/sub/a.txt").write_text("x")
    (tmp_path / "texts/b.txt").symlink_to("sub/a.txt")
    (tmp_path / "texts/c.txt").symlink_to(tmp_path / "texts/b.txt")
    (tmp_path / "texts/again").symlink_to("sub")
    (tmp_path / "texts/round").symlink_to(".")
    (tmp_path / "texts/.hidden").symlink_to("/etc")
    (tmp_path / "link").symlink_to("texts")
    (source,) = resolve_sources([str(tmp_path / "link")])
    assert names(source) == ["b.txt", "c.txt", "sub/a.txt"]
    (tmp_path / "one.txt").symlink_to("texts/b.txt")
    (source,) = resolve_sources([str(tmp_path / "one.txt")])
    assert names(source) == ["one.txt"]


@pytest.mark.parametrize(
    ("given", "hub_id"),
    [
        ("HuggingFaceFW/fineweb-edu", "HuggingFaceFW/fineweb-edu"),
        ("web=org/data_set.v2", "org/data_set.v2"),
        ("https://huggingface.co/datasets/tatsu-lab/alpaca", "tatsu-lab/alpaca"),
        ("hf://datasets/tatsu-lab/alpaca/data/a.parquet", "tatsu-lab/alpaca"),
    ],
)
def test_a_dataset_of_the_hub_is_to_be_fetched(given, hub_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with config_line(f"hf download {hub_id} --repo-type dataset"):
        resolve_sources([given])
    with config_error("https:// is not supported; mount it .* or copy it"):
        resolve_sources(["https://example.com/a/b.jsonl"])
    Path("data").mkdir()
    for path in ("a/b/c", "data/corpus.jsonl", "corpus.jsonl"):
        with config_error("No such file or directory") as caught:
            resolve_sources([path])
        assert "hf download" not in str(caught.value)


def test_pipe_in_a_folder_is_not_opened(tmp_path):
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
def test_unusable_source_is_named(tmp_path, make, message):
    path = tmp_path / "the-source"
    make(path)
    with config_line(message) as caught:
        resolve_sources([str(path)])
    assert "the-source" in str(caught.value)


def test_dangling_link_in_a_folder_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with config_error(r"gone\.txt cannot be read"):
        resolve_sources([str(tmp_path)])


def test_unreadable_file_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("x")
    sources = resolve_sources([str(path)])

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    # chmod would not stop root, which tests in containers often are.
    monkeypatch.setattr(Path, "open", refuse)
    with config_error(r"a\.txt cannot be read \(Permission denied\)"):
        content_fingerprint(sources)


@pytest.mark.parametrize("again", ["a.txt", "x=a.txt", "./a.txt", "folder", "hard.txt", "link.txt"])
def test_what_is_given_twice_is_refused(again, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for name in ("a.txt", "folder/b.txt", "other.txt"):
        Path(name).write_text("the same")
    Path("link.txt").symlink_to("a.txt")
    os.link("a.txt", "hard.txt")
    os.link("a.txt", "folder/a.txt")
    resolve_sources(["a.txt", "other.txt"])
    with config_error(r"must not repeat a\.txt, which .* too; name it once"):
        resolve_sources(["a.txt", "other.txt", again])


def test_no_source_is_an_error():
    with config_error("SOURCE is missing"):
        resolve_sources([])


def test_empty_name_is_not_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "private.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    with config_error(r"SOURCE \(''\) must not be empty; name a file"):
        resolve_sources([""])


def test_fingerprints_see_content_and_name(tmp_path):
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


def test_what_has_been_prepared_is_no_text(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "texts/old")
    for source in (tmp_path / "texts", tmp_path / "texts/old"):
        with config_error(r"texts/old must be text, and is a folder that moepp"):
            resolve_sources([str(source)])
