"""Hugging Face datasets from local folders."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from moepp_megatron.data.documents import Skipped
from tests.refusals import config_error
from tests.unit.data.conftest import read_all, write_arrow

TEXTS = [f"text {number} " * 5 for number in range(25)]


def save_to_disk(folder, texts, rows=4):
    """Write as `datasets` does: stream files of batches, and three JSON files of state."""
    folder.mkdir(parents=True)
    shards = {"data-00000-of-00002.arrow": texts[:10], "data-00001-of-00002.arrow": texts[10:]}
    for name, part in shards.items():
        table = pa.table({"text": part, "id": list(range(len(part)))})
        write_arrow(folder / name, table, max_chunksize=rows)
    state = {"_data_files": [{"filename": name} for name in shards], "_fingerprint": "x"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    # Left by `map`; no part of the dataset.
    (folder / "cache-1.arrow").write_bytes((folder / "data-00000-of-00002.arrow").read_bytes())
    return folder


def test_save_to_disk_is_read_in_order(tmp_path):
    folder = save_to_disk(tmp_path / "saved", TEXTS)
    assert read_all(folder) == TEXTS
    whole = read_all(folder / "data-00001-of-00002.arrow")
    assert whole == TEXTS[10:]


def test_a_cache_of_the_package_is_refused(tmp_path):
    """It holds all splits, and a description that is no text."""
    folder = save_to_disk(tmp_path / "saved", TEXTS)
    (folder / "state.json").unlink()
    with config_error("and is a cache of the package datasets; load it"):
        read_all(folder)


def test_a_dataset_must_be_whole(tmp_path):
    folder = save_to_disk(tmp_path / "saved", TEXTS)
    (folder / "data-00001-of-00002.arrow").unlink()
    with config_error(r"must hold all files .* data-00001-of-00002\.arrow is"):
        read_all(folder)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_text_that_is_not_utf8_is_left_out(tmp_path, kind):
    """Whoever wrote the column has not checked it."""
    raw = pa.array([b"good", b"bad \xff", None, "\u2116".encode()], pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())})
    path = tmp_path / f"texts.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path)
    else:
        write_arrow(path, table)
    left_out = [Skipped("not UTF-8 text"), Skipped("empty")]
    assert read_all(path) == ["good", *left_out, "\u2116"]


def test_datasets_own_files(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "one", num_shards=3)
    assert read_all(tmp_path / "one") == TEXTS
    both = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"text": TEXTS}),
        test=datasets.Dataset.from_dict({"text": ["x"]}),
    )
    both.save_to_disk(tmp_path / "both")
    with config_error("holds a dataset of the splits test, train"):
        read_all(tmp_path / "both")
    assert read_all(tmp_path / "both/train") == TEXTS


def test_arrow_s_file_format(tmp_path):
    table = pa.table({"body": TEXTS})
    write_arrow(tmp_path / "a.arrow", table, pa.ipc.new_file, max_chunksize=3)
    assert read_all(tmp_path / "a.arrow", "body") == TEXTS
    with config_error(r"has no column text; set --text-key to one of: body"):
        read_all(tmp_path / "a.arrow")
    (tmp_path / "b.arrow").write_bytes(b"no table")
    with config_error(r"b\.arrow is no readable Arrow file"):
        read_all(tmp_path / "b.arrow")


@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_arrow_that_unpacks_to_far_more_is_refused(tmp_path, compression, new, dictionary):
    def write(name, text):
        table = pa.table({"text": [text, "b", "c"]})
        if dictionary:
            table = pa.table({"text": table["text"].dictionary_encode()})
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with new(str(tmp_path / name), table.schema, options=options) as writer:
            writer.write_table(table)
        return tmp_path / name

    assert read_all(write("sound.arrow", "a")) == ["a", "b", "c"]
    with config_error(r"bomb\.arrow must hold at most 100 times its size"):
        read_all(write("bomb.arrow", "a" * (80 << 20)))


def test_arrow_s_file_format_without_its_end(tmp_path):
    write_arrow(tmp_path / "a.arrow", pa.table({"text": TEXTS}), pa.ipc.new_file)
    content = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(content[: content.rindex(b"\xff\xff\xff\xff")])
    with config_error(r"a\.arrow is no readable Arrow file .*end is missing"):
        read_all(tmp_path / "a.arrow")


def test_parquet_of_the_hub(tmp_path):
    data = tmp_path / "hub/data"
    data.mkdir(parents=True)
    for index, part in enumerate((TEXTS[:12], TEXTS[12:])):
        parquet.write_table(pa.table({"text": part}), data / f"train-0000{index}-of-00002.parquet")
    (tmp_path / "hub/README.md").write_text("a card, no text")
    assert read_all(tmp_path / "hub") == TEXTS
    parquet.write_table(pa.table({"text": ["x"]}), data / "test-00000-of-00001.parquet")
    with config_error("splits test, train, and must be one of them"):
        read_all(tmp_path / "hub")
