import builtins
import json
from pathlib import Path

import pytest

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.data import documents
from moepp_megatron.data.documents import Skipped, check_usable, plan_pieces, read_piece
from moepp_megatron.data.sources import resolve_sources


def read_all(path: Path, text_key: str = "text") -> list[str | Skipped]:
    pieces = plan_pieces(resolve_sources([str(path)]), text_key)
    return [document for piece in pieces for document in read_piece(piece, text_key)]


def test_text_files(tmp_path: Path):
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


def test_jsonl_records(tmp_path: Path):
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
def test_jsonl_cut_anywhere_gives_every_record_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
):
    texts = [f"\u00e9{i}" * (i % 9) + "." for i in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"k": text}, ensure_ascii=False) + "\n" for text in texts))
    monkeypatch.setattr(documents, "PIECE_BYTES", piece_bytes)
    assert read_all(path, "k") == texts


def test_parquet_rows(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    texts = ["one", None, "", "zwei", "three"]
    parquet.write_table(pyarrow.table({"id": range(5), "body": texts}), path, row_group_size=2)
    assert read_all(path, "body") == ["one", Skipped("empty"), Skipped("empty"), "zwei", "three"]
    assert read_all(path, "id") == [Skipped("no text in the column id")] * 5
    with pytest.raises(ConfigError, match="no column text; set --text-key to one of: id, body"):
        read_all(path)


def test_damaged_parquet_is_named(tmp_path: Path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 this is not one")
    with pytest.raises(ConfigError, match=r"a\.parquet is no readable parquet file"):
        read_all(path)


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"x")
    real_import = builtins.__import__

    def without_pyarrow(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        read_all(path)


def test_pieces_keep_the_order_and_cover_all_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(f"{i:02}" * (i + 1))
    (tmp_path / "99.jsonl").write_text('{"text": "last"}\n' * 10)
    sources = resolve_sources([str(tmp_path)])
    monkeypatch.setattr(documents, "PIECE_BYTES", 50)
    pieces = plan_pieces(sources, "text")
    assert len(pieces) > 5
    assert sum(piece.size for piece in pieces) == sources[0].size
    assert [document for piece in pieces for document in read_piece(piece, "text")] == [
        *(f"{i:02}" * (i + 1) for i in range(20)),
        *["last"] * 10,
    ]


def test_source_without_a_usable_document_is_named_with_reasons(tmp_path: Path):
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "bad.jsonl").write_text('{"content": "a"}\n{"content": "b"}\nnonsense\n')
    sources = resolve_sources([str(tmp_path / "good.txt"), str(tmp_path / "bad.jsonl")])
    with pytest.raises(ConfigError) as caught:
        check_usable(sources, plan_pieces(sources, "text"), "text")
    assert "bad.jsonl has no usable document" in str(caught.value)
    assert "no text under the key text: 2" in str(caught.value)
    assert "not a JSON object: 1" in str(caught.value)
    check_usable(sources, plan_pieces(sources, "content"), "content")
