"""Paths of objects: what they read and write, what they refuse, which errors mean what."""

import hashlib
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest

from moepp_megatron.runtime.object_store import ObjectPath, StoreError, check_store, place
from tests.refusals import config_error


@pytest.mark.parametrize("text", ["s3://bucket/a/b", "s3:/bucket/a/b/", Path("s3://bucket/a/b")])
def test_an_address_is_a_path_of_objects(text):
    path = place(text)
    assert isinstance(path, ObjectPath)
    assert str(path) == "s3://bucket/a/b"
    assert str(path.parent / "c") == "s3://bucket/a/c"
    assert path.with_name("c").name == "c"
    assert path.is_absolute()
    assert pickle.loads(pickle.dumps(path)) == path
    assert place(path) is path


@pytest.mark.parametrize("text", ["a/b", "/a", "./s3://x", "~/a"])
def test_a_path_is_of_this_machine(text):
    assert not isinstance(place(text), ObjectPath)
    assert place(text) == Path(os.path.expanduser(text))


def test_the_operating_system_is_given_none(tmp_path):
    path = place("s3://bucket/a")
    for call in (
        lambda: os.path.exists(path),
        lambda: os.stat(path),
        lambda: shutil.rmtree(path),
        lambda: path.rename(tmp_path),
        lambda: path.mkdir(),
    ):
        with pytest.raises(TypeError, match="is no path of this machine"):
            call()


def test_objects_are_read_and_written(store, tmp_path):
    folder = place(f"s3://{store.bucket}/a")
    assert list(folder.iterdir()) == []
    assert not folder.exists()
    content = os.urandom(20 << 20)
    file = tmp_path / "file"
    file.write_bytes(content)
    (folder / "large").upload(file)
    (folder / "b/small").write_bytes(b"text")
    found = {path.name: (path.is_file(), path.is_dir()) for path in folder.iterdir()}
    assert found == {"large": (True, False), "b": (False, True)}
    assert (folder / "large").stat().st_size == len(content)
    assert [path.name for path in folder.glob("l*")] == ["large"]
    assert (folder / "b/small").read_text() == "text"
    with pytest.raises(FileNotFoundError):
        (folder / "none").read_bytes()
    with (folder / "large").open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        assert digest == hashlib.sha256(content).hexdigest()
        stream.seek(1_000_000)
        assert stream.read(10) == content[1_000_000:1_000_010]
        assert stream.read() == content[1_000_010:]
    store.forget()
    with (folder / "large").open("rb", buffering=0) as stream:
        stream.seek(5)
        assert stream.read(7) == content[5:12]
    assert store.sent == 7
    folder.delete_below("large")
    assert store.names() == ["a/b/small"]


def test_what_cannot_be_used(store, monkeypatch):
    folder = place(f"s3://{store.bucket}/a")
    check_store(Path("here"), "checkpoint.dir", writes=True)
    check_store(folder, "checkpoint.dir", writes=True)
    check_store(folder, "checkpoint.load", writes=False)
    assert store.names() == []
    for writes in (True, False):
        with config_error("the bucket s3://no-.* does not exist; create"):
            check_store(place(f"s3://{store.missing}/a"), "checkpoint.dir", writes=writes)
        store.deny("PUT", "GET", "HEAD")
        with config_error(r"do not allow it \(AccessDenied at s3://"):
            check_store(folder, "checkpoint.dir", writes=writes)
        store.deny()
    with config_error("profile nowhere of multi-storage-client cannot"):
        check_store(place("msc://nowhere/a"), "checkpoint.dir", writes=True)
    store.stop()
    with pytest.raises(StoreError, match="Could not connect to the endpoint") as caught:
        check_store(folder, "checkpoint.dir", writes=True)
    assert caught.value.exit_code == 3
    # What cannot be asked for is not missing.
    for ask in (folder.is_dir, folder.is_file, folder.exists, (folder / "x").read_bytes):
        with pytest.raises(StoreError):
            ask()
    store.start()


def test_a_profile_of_a_configuration_file(store, tmp_path, monkeypatch):
    file = tmp_path / "msc.yaml"
    file.write_text(
        "profiles:\n  mine:\n    storage_provider:\n      type: s3\n      options:\n"
        f"        base_path: {store.bucket}/below\n"
    )
    monkeypatch.setenv("MSC_CONFIG", str(file))
    path = place("msc://mine/a/x")
    path.write_bytes(b"1")
    assert store.names() == ["below/a/x"]
    assert [str(one) for one in path.parent.iterdir()] == ["msc://mine/a/x"]
    assert path.read_bytes() == b"1"


@pytest.mark.parametrize("package", ["multistorageclient", "boto3"])
def test_a_package_that_is_missing(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(StoreError) as caught:
        check_store(place(f"s3://missing-{package}/a"), "checkpoint.dir", writes=True)
    text = str(caught.value)
    assert f"needs the package {package}, which is not installed" in text
    assert "pip install 'multi-storage-client[boto3]'" in text
    assert caught.value.exit_code == 3
