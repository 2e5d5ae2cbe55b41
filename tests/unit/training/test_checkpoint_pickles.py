"""Ways to have torch unpickle something else than what was looked at."""

import dataclasses
import io
import os
import pickle
import tracemalloc
import zipfile

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from moepp_megatron.interop.checkpoint_tensors import TensorReader
from moepp_megatron.training.checkpoint import plain_pickle
from moepp_megatron.training.checkpoint.data_only import load_data, only_data, unsafe_pickle
from moepp_megatron.training.checkpoint.plain_pickle import (
    MAX_BYTES,
    UnsafePickleError,
    read_metadata,
)
from tests.parallel.planted_pickles import Bomb, stateful
from tests.refusals import config_error

KEY = "common_state/shard_0_1"


def write(folder, places):
    """An index with one byte entry, which may have several places."""
    storage, content = {}, b""
    for index, value in places.items():
        record = io.BytesIO()
        torch.save([value], record)
        storage[index] = _StorageInfo("__0_0.distcp", len(content), len(record.getvalue()))
        content += record.getvalue()
    folder.mkdir()
    index = Metadata({KEY: BytesStorageMetadata()}, storage_data=storage)
    write_checkpoint(folder, content, index)


def write_checkpoint(folder, content, index):
    (folder / "__0_0.distcp").write_bytes(content)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    write_index(folder, index)


def write_index(folder, index):
    content = index if isinstance(index, bytes) else pickle.dumps(index)
    (folder / ".metadata").write_bytes(content)


def load_like_megatron(folder):
    """As `dist_checkpointing.serialization.load_common_state_dict`."""
    load({KEY: io.BytesIO()}, storage_reader=FileSystemReader(folder), no_dist=True)


def shard(folder):
    """Put a tensor of two shards into the index of `write`; what is written of it."""
    properties = TensorProperties(dtype=torch.bfloat16)
    chunks = [ChunkStorageMetadata(torch.Size([i, 0]), torch.Size([1, 3])) for i in range(2)]
    tensor = TensorStorageMetadata(properties, torch.Size([2, 3]), chunks)
    index = read_metadata(folder)
    index.state_dict_metadata["weight"] = tensor
    for chunk in chunks:
        index.storage_data[MetadataIndex("weight", chunk.offsets)] = _StorageInfo(
            "__0_0.distcp", 0, 6
        )
    write_index(folder, index)
    return tensor


def test_second_place_of_a_name_is_looked_at(tmp_path):
    exploded = tmp_path / "exploded"
    places = {MetadataIndex(KEY): Bomb(exploded), MetadataIndex(KEY, torch.Size([0])): "harmless"}
    write(tmp_path / "checkpoint", places)
    reason = unsafe_pickle(tmp_path / "checkpoint")
    assert "entry common_state/shard_0_1 asks for" in reason
    assert not exploded.exists()
    # Otherwise this would happen: torch takes the other place.
    load_like_megatron(tmp_path / "checkpoint")
    assert exploded.exists()


def test_index_of_a_rank_is_refused(tmp_path):
    folder, exploded = tmp_path / "checkpoint", tmp_path / "exploded"
    write(folder, {MetadataIndex(KEY): "harmless"})
    assert unsafe_pickle(folder) is None
    metadata = read_metadata(folder)
    # Data, but nothing that torch can use.
    broken = dataclasses.replace(metadata, storage_meta=torch.Size([1]))
    write_index(folder, broken)
    (folder / "__0.metadata").write_bytes(pickle.dumps(Bomb(exploded)))
    assert unsafe_pickle(folder) == "__0.metadata does not belong into this format"
    assert not exploded.exists()
    # Otherwise this would happen: torch falls back to the rank's own index.
    # torch 2.11 says it otherwise, after it has read the index.
    is_old = torch.__version__.startswith("2.11.")
    message = "metadata is None" if is_old else "rank local metadata read failed"
    with pytest.raises(CheckpointException, match=message):
        load_like_megatron(folder)
    assert exploded.exists()


def test_a_pickle_that_changes_what_it_names_is_refused(tmp_path):
    folder, exploded = tmp_path / "checkpoint", tmp_path / "exploded"
    write(folder, {MetadataIndex(KEY): "harmless"})
    write_index(folder, stateful((folder / ".metadata").read_bytes(), exploded))
    before = dict(torch.serialization._get_layout.cache)
    for _ in range(3):
        assert unsafe_pickle(folder) == ".metadata changes what it did not make"
        with pytest.raises(UnsafePickleError):
            load_data({}, folder)
    assert not exploded.exists()
    assert torch.serialization._get_layout.cache == before
    # Otherwise this would happen: the first reading is harmless, the second one is not.
    try:
        assert isinstance(pickle.loads((folder / ".metadata").read_bytes()), Metadata)
        assert not exploded.exists()
        pickle.loads((folder / ".metadata").read_bytes())
        assert exploded.exists()
    finally:
        torch.serialization._get_layout.cache = before


@pytest.mark.parametrize("code_is_allowed", [False, True])
def test_megatron_core_is_given_nothing_but_data(tmp_path, monkeypatch, code_is_allowed):
    """Even where nobody looked before, and where the environment allows code elsewhere."""
    if code_is_allowed:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder, exploded = tmp_path / "checkpoint", tmp_path / "exploded"
    write(folder, {MetadataIndex(KEY): Bomb(exploded)})
    (folder / "__0.metadata").write_bytes(pickle.dumps(Bomb(exploded)))
    with pytest.raises(CheckpointException, match="Weights only load failed"):
        load_data({}, folder)
    assert not exploded.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    assert ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" in os.environ) == code_is_allowed


def test_what_the_environment_said_holds_again(monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    with only_data():
        assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
    assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "0"


def test_index_is_the_one_that_torch_wrote(tmp_path):
    folder = tmp_path / "checkpoint"
    write(folder, {MetadataIndex(KEY): "harmless"})
    tensor = shard(folder)
    # torch stores the folder's path as an object, whose module Python 3.13 has renamed.
    written = pickle.loads((folder / ".metadata").read_bytes())
    written.storage_meta = StorageMeta(checkpoint_id=tmp_path)
    write_index(folder, written)
    found = read_metadata(folder)
    assert found.state_dict_metadata == {KEY: BytesStorageMetadata(), "weight": tensor}
    assert found.storage_data == written.storage_data
    # Nobody reads where the checkpoint once was.
    assert found.storage_meta is None


def deep(depth):
    """Lists in lists."""
    return b"\x80\x04" + b"](" * depth + b"e" * depth + b"."


def of(**fields):
    """A harmless index with one field changed."""
    storage = {MetadataIndex("a"): _StorageInfo("__0_0.distcp", 0, 1)}
    content = {"state_dict_metadata": {"a": BytesStorageMetadata()}, "storage_data": storage}
    return Metadata(**(content | fields))


def stored(*place):
    return of(storage_data={MetadataIndex("a"): _StorageInfo(*place)})


def whole(*sizes, **fields):
    """A tensor in one piece."""
    size = torch.Size(sizes)
    chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
    content = {"properties": TensorProperties(torch.float32), "size": size, "chunks": [chunk]}
    return TensorStorageMetadata(**(content | fields))


def tensor_of(**fields):
    return of(state_dict_metadata={"a": whole(2, **fields)})


GLOBAL = b"X\x05\x00\x00\x00torchX\x04\x00\x00\x00Size\x93"


@pytest.mark.parametrize(
    ("index", "why"),
    [
        (b"", "cannot be read"),
        (b"\x80\x04", "cannot be read"),
        (b"\x80\x04.", "cannot be read"),
        (b"\x80\x04h\x05.", "cannot be read"),
        (b"\x80\x04u.", "cannot be read"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.", "cannot be read"),
        (b"\x80\x04cposix\nsystem\n.", "uses the instruction GLOBAL"),
        (b"\x80\x04(iposix\nsystem\n.", "uses the instruction INST"),
        (b"\x80\x04Pname\n.", "uses the instruction PERSID"),
        (b"\x80\x04\x82\x01.", "uses the instruction EXT1"),
        (b"\x80\x04" + GLOBAL + b")\x81}\x92.", "uses the instruction NEWOBJ_EX"),
        (b"\x80\x04" + GLOBAL + b"}b.", "changes what it did not make"),
        (b"\x80\x04" + GLOBAL + GLOBAL + b"\x93.", "computes a name"),
        (b"\x80\x04" + GLOBAL + b")R)R.", "calls what is not a name"),
        (b"\x80\x04X\x05\x00\x00\x00torchX\x0c\x00\x00\x00Size.__new__\x93.", "torch.Size.__new__"),
        (b"\x80\x04})K\x01s.", "has a tuple as a key"),
        (b"\x80\x04\x8a\x09" + b"\xff" * 8 + b"\x7f.", "a number of more than 64 bits"),
        (deep(200), "is nested too deeply"),
        (b"\x80\x04" + b")" * 200_000 + b".", "is nested too deeply"),
        ({"a": 1}, "holds a dict, not an index"),
        (torch.Size([1]), "holds a Size, not an index"),
        (of(state_dict_metadata=None), "in place of a dictionary"),
        (of(storage_data=[]), "in place of a dictionary"),
        (of(state_dict_metadata={1: BytesStorageMetadata()}), "in place of a name"),
        (of(state_dict_metadata={"a": "b"}), "in place of a TensorStorageMetadata"),
        (of(storage_data={"a": _StorageInfo("a", 0, 1)}), "in place of a MetadataIndex"),
        (of(storage_data={MetadataIndex("a"): ("a", 0, 1)}), "in place of a _StorageInfo"),
        (stored("../a", 0, 1), "outside of the folder"),
        (stored("..", 0, 1), "outside of the folder"),
        (stored("a", -1, 1), "in place of a count"),
        (stored("a", 0, 1, ["zstd"]), "an extension"),
        (tensor_of(size=(2,)), "in place of a size"),
        (tensor_of(size=torch.Size([1])), "a shard outside of its tensor"),
        (tensor_of(size=torch.Size([2, 2])), "a shard outside of its tensor"),
        (tensor_of(chunks=None), "in place of a list"),
        (tensor_of(properties=torch.float32), "in place of a tensor's properties"),
        (tensor_of(properties=TensorProperties(torch.float32, torch.sparse_coo)), "not strided"),
    ],
)
def test_anything_but_an_index_is_refused_in_one_line(tmp_path, index, why):
    write_index(tmp_path, index)
    reason = unsafe_pickle(tmp_path)
    assert reason.startswith(".metadata ")
    assert why in reason
    assert "\n" not in reason


def test_an_index_that_contains_itself_is_refused(tmp_path):
    entries = {}
    entries["a"] = entries
    write_index(tmp_path, of(state_dict_metadata=entries))
    assert "in place of a TensorStorageMetadata" in str(unsafe_pickle(tmp_path))


def test_size_of_the_index_is_bounded(tmp_path):
    with (tmp_path / ".metadata").open("wb") as file:
        # Sparse: nothing but its length is there.
        file.truncate(MAX_BYTES + 1)
    assert "is too large" in str(unsafe_pickle(tmp_path))


@pytest.mark.parametrize("values", [b"}", b"]", b"K\x01\x85", b"\x8c\x01a", b"]\x94(]]e"])
def test_memory_of_the_index_is_bounded(tmp_path, values, monkeypatch):
    """A byte of a pickle may be a dictionary."""
    monkeypatch.setattr(plain_pickle, "_MAX_MEMORY", 1 << 20)
    content = b"\x80\x04]" + (b"(" + values * 10_000 + b"e") * 10 + b"."
    (tmp_path / ".metadata").write_bytes(content)
    tracemalloc.start()
    reason = unsafe_pickle(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "holds values of more than 1 MiB" in str(reason)
    assert peak < MAX_BYTES + (4 << 20)


@pytest.mark.parametrize("size", [(2,), (1 << 62, 4)])
def test_a_shard_of_more_bytes_than_it_has_is_refused(tmp_path, size):
    """A tensor of one value that stands for all would otherwise take their memory."""
    place = MetadataIndex("a", torch.Size([0] * len(size)))
    storage = {place: _StorageInfo("__0_0.distcp", 0, 7)}
    write_index(tmp_path, Metadata({"a": whole(*size)}, storage_data=storage))
    assert "7 bytes hold a shard of" in str(unsafe_pickle(tmp_path))


def packed(value):
    """Return the bytes that torch saves of a value, compressed: torch reads that as well."""
    saved, smaller = io.BytesIO(), io.BytesIO()
    torch.save(value, saved)
    written = zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(saved) as source, written as to:
        for entry in source.infolist():
            to.writestr(entry.filename, source.read(entry))
    return smaller.getvalue()


@pytest.mark.parametrize("is_tensor", [True, False])
def test_a_record_that_unpacks_to_much_is_refused(tmp_path, is_tensor):
    record = packed(torch.zeros(100_000) if is_tensor else [torch.zeros(100_000)])
    assert len(record) < 10_000
    key = "weight" if is_tensor else KEY
    place = MetadataIndex(key, torch.Size([0]) if is_tensor else None)
    entry = whole(100) if is_tensor else BytesStorageMetadata()
    storage = {place: _StorageInfo("__0_0.distcp", 5, len(record))}
    write_checkpoint(tmp_path, b"other" + record, Metadata({key: entry}, storage_data=storage))
    assert f"entry {key} is compressed" in str(unsafe_pickle(tmp_path))
    if is_tensor:
        with config_error("weight is compressed"):
            TensorReader(tmp_path).read("weight")
    (tmp_path / "__0_0.distcp").write_bytes(b"other" + record[:-1])
    assert f"entry {key} is cut short" in str(unsafe_pickle(tmp_path))
