"""Arrays of NPZ files, also of damaged and crafted ones: no traceback but a ValueError."""

import io
import zipfile

import numpy as np
import pytest

from moepp_megatron.data.npz import read_arrays
from moepp_megatron.interop.score import _read_input_ids

IDS = np.arange(6).reshape(2, 3)


def _npy(header=None):
    content = io.BytesIO()
    np.save(content, IDS)
    if header is None:
        return content.getvalue()
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\0" * 48


def _zip(path, content, method=zipfile.ZIP_STORED, name="ids"):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(f"{name}.npy", content)
    return bytearray(path.read_bytes())


def _changed(path, method, change):
    content = _zip(path, _npy(), method)
    change(content)
    path.write_bytes(content)


def _flag(content):
    for sign, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(sign) + offset] |= 1


def _method(content):
    for sign, offset in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        content[content.index(sign) + offset] = 99


def _stream(content):
    start = 30 + len("ids.npy")
    content[start : start + 20] = b"\xff" * 20


def _claim(shape):
    return f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}"


WRONG = {
    "numpy.save": (
        lambda path: path.write_bytes(_npy()),
        "one array, of numpy.save",
    ),
    "text": (lambda path: path.write_text("no zip"), "File is not a zip file"),
    "empty": (lambda path: path.touch(), "File is not a zip file"),
    "other name": (lambda path: _zip(path, _npy(), name="other"), "it has no array ids"),
    "deflate": (lambda path: _changed(path, zipfile.ZIP_DEFLATED, _stream), "decompressing"),
    "lzma": (lambda path: _changed(path, zipfile.ZIP_LZMA, _stream), "."),
    "bz2": (lambda path: _changed(path, zipfile.ZIP_BZIP2, _stream), "."),
    "method": (lambda path: _changed(path, zipfile.ZIP_STORED, _method), "compression"),
    "encrypted": (lambda path: _changed(path, zipfile.ZIP_STORED, _flag), "password"),
    "brackets": (lambda path: _zip(path, _npy("[" * 3000)), "."),
    "nul": (lambda path: _zip(path, _npy("{'descr': \0")), "."),
    "claim": (lambda path: _zip(path, _npy(_claim("(1099511627776,)"))), "."),
    "negative": (lambda path: _zip(path, _npy(_claim("(-2,)"))), "."),
    "objects": (
        lambda path: np.savez(path, ids=np.array([{}], dtype=object)),
        "allow_pickle=False",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_such_file_is_a_value_error(kind, tmp_path):
    write, said = WRONG[kind]
    write(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=said) as caught:
        read_arrays(tmp_path / "a.npz", "ids")
    assert "\n" not in str(caught.value)


def test_what_numpy_has_written_is_read(tmp_path):
    for write in (np.savez, np.savez_compressed):
        write(tmp_path / "a.npz", other=np.ones(3), ids=IDS)
        found = read_arrays(tmp_path / "a.npz", "ids", "absent", "other")
        assert np.array_equal(found["ids"], IDS)
        assert found.keys() == {"ids", "other"}


def test_a_small_file_that_unpacks_to_much_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, input_ids=np.zeros((1, 9_000_000), np.int64))
    assert path.stat().st_size < 100_000
    line = rf"--tokens \({path}\) must be an npz .*unpacks to more than 67108864 bytes; write it"
    with pytest.raises(ValueError, match=line):
        _read_input_ids(path)
