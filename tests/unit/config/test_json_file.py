"""JSON that somebody else wrote: what is refused, and that it is refused with a ValueError."""

import json
import tracemalloc

import pytest

from moepp_megatron.config.json_file import MAX_DEPTH, MAX_VALUES, parse_json, read_json

HOSTILE = [
    (b"[" * 1_000_000, "nested more than 64 levels"),
    (b'{"a":' * 500 + b"1" + b"}" * 500, "nested more than 64 levels"),
    (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested more than 64 levels"),
    (b'{"\\ud800": 1}', "half of a surrogate pair"),
    (b'["\xed\xa0\x80"]', "can't decode"),
    (b"\xff\xfe[\x00]\x00", "can't decode"),
    (b"1" * 5000, "Exceeds the limit"),
    (b"18446744073709551616", "more than 64 bits"),
    (b"[1", "Expecting"),
    (b"", "Expecting value"),
]


@pytest.mark.parametrize(("content", "why"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_json_is_refused_in_one_line(content, why, tmp_path):
    (tmp_path / "file.json").write_bytes(content)
    for read in (parse_json, lambda content: read_json(tmp_path / "file.json")):
        with pytest.raises(ValueError, match=why) as caught:
            read(content)
        assert "\n" not in str(caught.value)


def test_ordinary_json_is_what_the_library_reads(tmp_path):
    value = {"a": [1, -2.5, None, True, 2**64 - 1], "\u00e4": {"\U0001f600": []}}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert parse_json(text) == parse_json(text.encode()) == value
    deep = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert parse_json(deep) == json.loads(deep)


def test_a_file_beyond_the_limit_is_not_read(tmp_path):
    (tmp_path / "file.json").write_bytes(b"[1]")
    assert read_json(tmp_path / "file.json", 3) == [1]
    with pytest.raises(ValueError, match="more than 2 bytes"):
        read_json(tmp_path / "file.json", 2)


# Values that take the most memory for their length in a file.
SMALL = [b"[]", b"{}", b'{"":0}', b'[""]', b'""']


@pytest.mark.parametrize("value", SMALL, ids=range(len(SMALL)))
def test_values_that_outgrow_their_file_are_counted(value, tmp_path):
    content = b"[" + b",".join([value] * (MAX_VALUES + 1)) + b"]"
    (tmp_path / "file.json").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"more than {MAX_VALUES} values"):
            read_json(tmp_path / "file.json")
        assert tracemalloc.get_traced_memory()[1] < 2 * 100_000_000 + 3 * len(content)
    finally:
        tracemalloc.stop()
