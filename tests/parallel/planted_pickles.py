"""Checkpoints with a pickle in them that would run code, as an attacker would plant it."""

import io
import json
import pickle
from pathlib import Path


class Bomb:
    """Unpickled, it makes the file `path`."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return Path.touch, (self._path,)


# A plain bomb in `.metadata` or a file of tensors, and one that only a second reading sets off.
STATEFUL = "stateful .metadata"
PLANTS = (".metadata", STATEFUL, "__0_0.distcp")


def plant(checkpoint, name, exploded):
    """Put a pickle into a checkpoint, one of `PLANTS`, and have the manifest vouch for it."""
    is_stateful, name = name == STATEFUL, name.removeprefix("stateful ")
    path = checkpoint / name
    if is_stateful:
        path.write_bytes(stateful(path.read_bytes(), exploded))
    elif name == ".metadata":
        path.write_bytes(pickle.dumps(Bomb(exploded)))
    else:
        _plant_entry(checkpoint, path, Bomb(exploded))
        _vouch(checkpoint, ".metadata")
    _vouch(checkpoint, name)


def stateful(index, exploded):
    """An index that makes the file `exploded` when it is read for the second time in a process."""
    look_up = _text("torch.serialization") + _text("_get_layout") + b"\x93"

    def found(key):
        return look_up + key + b"\x85R"

    seen = found(_text("torch.strided"))
    cache = {
        _text("seen"): seen,
        seen: _text("torch"),
        _text("torch"): _text("Size"),
        _text("Size"): b")\x85",
        # The second time `seen` is this text too, and of two equal keys the last one counts.
        _text("changed"): _text("io"),
        _text("io"): _text("open"),
        _text("open"): _text(str(exploded)) + _text("w") + b"\x86",
        _text("torch.strided"): _text("changed"),
    }
    filled = b"}(" + b"".join(key + value for key, value in cache.items()) + b"u"
    replace = look_up + b"N" + b"}" + _text("cache") + filled + b"s\x86b0"
    module = found(found(_text("seen")))
    name = found(module)
    call = module + name + b"\x93" + found(name) + b"R0"
    # Behind them the index as it was, which remembers its values by their number.
    assert index[:2] == b"\x80\x04", "protocol 4"
    return index[:2] + replace + call + index[2:]


def _text(value):
    content = value.encode()
    return b"X" + len(content).to_bytes(4, "little") + content


def _plant_entry(checkpoint, path, bomb):
    """Append a pickled object and let the common state's entry point to it."""
    import torch

    content = io.BytesIO()
    torch.save([bomb], content)
    offset = path.stat().st_size
    path.write_bytes(path.read_bytes() + content.getvalue())
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        if index.fqn.startswith("common_state"):
            info.relative_path, info.offset = path.name, offset
            info.length = len(content.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def _vouch(checkpoint, name):
    from moepp_megatron.training.checkpoint.files import file_digest

    path = checkpoint / name
    manifest = json.loads((checkpoint / "integrity.json").read_bytes())
    manifest["files"][name] = file_digest(path)
    manifest["sizes"][name] = path.stat().st_size
    (checkpoint / "integrity.json").write_text(json.dumps(manifest))
