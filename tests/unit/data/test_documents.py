import builtins
import gzip
import json
import re

import pyarrow
import pytest
from pyarrow import parquet

from moepp_megatron.data import documents, source_files
from moepp_megatron.data.documents import Skipped, check_usable, plan_pieces
from moepp_megatron.data.source_files import SourceFile
from moepp_megatron.data.sources import resolve_sources
from tests.refusals import config_error, config_line, refusal
from tests.unit.data.conftest import pieces_of, read_all, write_arrow


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_text("plain\n")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfwith mark")
    (tmp_path / "c.txt").write_bytes("latin \u00e9".encode("latin-1"))
    (tmp_path / "d.bin").write_bytes(b"null\0byte")
    (tmp_path / "e.txt").write_text(" \n\t")
    assert read_all(tmp_path) == [
        "plain\n",
        "with mark",
        Skipped("not UTF-8 text"),
        Skipped("not UTF-8 text"),
        Skipped("empty"),
    ]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_a_file_that_has_gone_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"{}") if name.endswith("gz") else b"{}")
    (piece,) = pieces_of(path)
    path.unlink()
    with config_error(rf"{name} cannot be read \(No such file"):
        list(piece.documents("text"))


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_jsonl_under_another_name_is_refused(tmp_path, name):
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    with config_error(rf"{name} must be a text, .* rename it to \.jsonl"):
        read_all(tmp_path)
    # Other keys, and files of one record, are texts as any.
    assert read_all(tmp_path, "content") == [lines.decode()]


def test_jsonl_records(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "one"}',
        b"",
        b"{broken",
        b'["a list"]',
        b'{"other": "x"}',
        b'{"text": 5}',
        b'{"text": ""}',
        b'{"text": "\xff"}',
        rb'{"text": "\ud800"}',
        b'{"text": "no newline at the end"}',
    ]
    path.write_bytes(b"\n".join(lines))
    assert read_all(path) == [
        "one",
        Skipped("not a JSON object"),
        Skipped("not a JSON object"),
        Skipped("no text under the key text"),
        Skipped("no text under the key text"),
        Skipped("empty"),
        Skipped("not UTF-8 text"),
        Skipped("not UTF-8 text"),
        "no newline at the end",
    ]


@pytest.mark.parametrize("piece_bytes", [1, 7, 31, 64, 1000])
def test_jsonl_cut_anywhere_gives_every_record_once(tmp_path, monkeypatch, piece_bytes):
    texts = [f"\u00e9{i}" * (i % 9) + "." for i in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"k": text}, ensure_ascii=False) + "\n" for text in texts))
    monkeypatch.setattr(documents, "PIECE_BYTES", piece_bytes)
    assert read_all(path, "k") == texts


def zstd_file(path, *frames):
    path.write_bytes(b"".join(pyarrow.compress(frame, "zstd", asbytes=True) for frame in frames))


def test_compressed_files(tmp_path, monkeypatch):
    lines = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(3)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines[:20]) + gzip.compress(lines[20:]))
    zstd_file(tmp_path / "b.jsonl.zst", lines[:20], lines[20:])
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("pl\u00e4in".encode()))
    zstd_file(tmp_path / "d.ZST", b"other")
    (tmp_path / "e.bin.gz").write_bytes(gzip.compress(b"a\0b"))
    # One part each, however small the pieces: compressed data cannot be entered in the middle.
    monkeypatch.setattr(documents, "PIECE_BYTES", 10)
    records = [f"text {i}" for i in range(3)]
    expected = [*records, *records, "pl\u00e4in", "other", Skipped("not UTF-8 text")]
    assert read_all(tmp_path) == expected


def test_which_files_have_no_checksum(tmp_path):
    def lacks(name, compression):
        return SourceFile(tmp_path / name, name, "text", 0, 0, compression).lacks_checksum()

    zstd_file(tmp_path / "a.zst", b"text" * 99)
    assert lacks("a.zst", "zstd")
    # Frames of pzstd begin with one that is skipped; bit 2 of a frame's descriptor is the checksum.
    frame = bytearray((tmp_path / "a.zst").read_bytes())
    (tmp_path / "b.zst").write_bytes(b"\x50\x2a\x4d\x18\4\0\0\0size" + frame)
    assert lacks("b.zst", "zstd")
    frame[4] |= 0b100
    (tmp_path / "c.zst").write_bytes(frame)
    assert not lacks("c.zst", "zstd")
    assert not lacks("a.zst", "gzip")


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "other bytes"])
def test_damaged_compressed_file_is_named(tmp_path, suffix, damage):
    path = tmp_path / f"a.jsonl.{suffix}"
    content = b'{"text": "a"}\n' * 1000
    if suffix == "gz":
        path.write_bytes(gzip.compress(content))
    else:
        zstd_file(path, content)
    data = path.read_bytes()
    path.write_bytes(data[:-9] if damage == "cut" else b"not what the name says")
    with config_line(rf"a\.jsonl\.{suffix} cannot be decompressed"):
        read_all(path)


def test_compressed_parquet_is_refused(tmp_path):
    (tmp_path / "a.parquet.gz").write_bytes(b"x")
    with config_error(r"a\.parquet\.gz is compressed parquet; decompress it"):
        read_all(tmp_path)


def test_parquet_rows(tmp_path):
    path = tmp_path / "a.parquet"
    texts = ["one", None, "", "zwei", "three"]
    parquet.write_table(pyarrow.table({"id": range(5), "body": texts}), path, row_group_size=2)
    assert read_all(path, "body") == ["one", Skipped("empty"), Skipped("empty"), "zwei", "three"]
    assert read_all(path, "id") == [Skipped("no text under the key id")] * 5
    with config_error("no column text; set --text-key to one of: id, body"):
        read_all(path)


def test_a_column_that_is_there_twice_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, path)
    for text_key in ("text", None):
        with config_error(r"a.parquet has several columns text; rename all"):
            pieces_of(path, text_key)


def test_damaged_parquet_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 this is not one")
    with config_error(r"a\.parquet is no readable parquet file"):
        read_all(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_without_pyarrow_it_is_said_what_to_install(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_bytes(b"x")
    real_import = builtins.__import__

    def without_pyarrow(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with config_error("pip install pyarrow"):
        read_all(path)


def test_source_without_a_usable_document_is_named_with_reasons(tmp_path):
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "bad.jsonl").write_text('{"content": "a"}\n{"content": "b"}\nnonsense\n')
    sources = resolve_sources([str(tmp_path / "good.txt"), str(tmp_path / "bad.jsonl")])
    told = refusal(check_usable, sources, plan_pieces(sources, "text"), "text")
    assert "bad.jsonl has no usable document" in told
    assert "no text under the key text: 2" in told
    assert "not a JSON object: 1" in told
    check_usable(sources, plan_pieces(sources, "content"), "content")


# Memory follows what is unpacked, so a small file must not unpack to much.
@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.txt.zst", "a.jsonl.zst"])
def test_a_small_file_that_unpacks_to_much_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(source_files, "_SMALL_BYTES", 1000)
    path = tmp_path / name
    lines = json.dumps({"text": "a" * 300_000}).encode() + b"\n"
    if name.endswith("gz"):
        path.write_bytes(gzip.compress(lines))
    else:
        zstd_file(path, lines)
    with config_line("must hold at most 100 times its size"):
        read_all(path)
    monkeypatch.setattr(source_files, "_SMALL_BYTES", 1_000_000)
    assert len(read_all(path)) == 1


def test_a_small_table_that_unpacks_to_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(source_files, "_SMALL_BYTES", 1000)
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["a" * 300_000], "id": [1]})
    parquet.write_table(table, path, compression="zstd")
    with config_error("must hold at most 100 times its size"):
        read_all(path)
    # Of another column nothing is unpacked.
    assert read_all(path, "id") == [Skipped("no text under the key id")]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_text_that_a_table_repeats_counts_each_time(kind, tmp_path, monkeypatch):
    path = tmp_path / f"a.{kind}"
    texts = pyarrow.array(["words " * 1000] * 99)
    if kind == "parquet":
        parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=33)
    else:
        write_arrow(path, pyarrow.table({"text": texts.dictionary_encode()}))
    assert path.stat().st_size < 30_000
    monkeypatch.setattr(source_files, "_MOST_TIMES", 1)
    monkeypatch.setattr(source_files, "_SMALL_BYTES", 600_000)
    assert len(read_all(path)) == 99
    monkeypatch.setattr(source_files, "_SMALL_BYTES", 500_000)
    with config_error("must hold at most 1 times its size"):
        read_all(path)
    (piece,) = pieces_of(path, None)
    with config_error("must hold at most 1 times its size"):
        list(piece.parts[0].records())


RECORDS = ({"messages": [{"role": "user", "content": "hm"}]}, {"conversations": [{"from": "gpt"}]})


@pytest.mark.parametrize("record", [*RECORDS, {"instruction": "a", "output": "b"}])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "array.json", "a.parquet"])
def test_conversations_without_chat_are_recognized(tmp_path, record, name):
    path = tmp_path / name
    path.write_text(json.dumps(record) + "\n" + json.dumps(record))
    match = "a conversation, without --chat: 2); prepare conversations with --chat, --tokenizer"
    if name == "a.json":
        match = "has a record in each line; rename it to .jsonl"
    elif name == "array.json":
        path.write_text(json.dumps([record, record], indent=2))
        match = f"is an array of records; write one in each line: jq -c '.[]' {path} > FILE.jsonl"
    elif name == "a.parquet":
        parquet.write_table(pyarrow.Table.from_pylist([record, record]), path)
        match = "is of conversations; prepare them with --chat, --tokenizer and --seq-length"
    sources = resolve_sources([str(path)])
    with config_error(re.escape(match)):
        check_usable(sources, plan_pieces(sources, "text"), "text")


def test_text_in_another_encoding_is_to_be_encoded(tmp_path):
    path = tmp_path / "a file.txt"
    path.write_bytes("w\u00f6rds".encode("utf-16"))
    sources = resolve_sources([str(path)])
    with config_error(r"unpack archives, .* iconv -f UTF-16 -t UTF-8 '/.*/a file.txt' > FILE"):
        check_usable(sources, plan_pieces(sources, "text"), "text")
