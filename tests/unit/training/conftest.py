"""Checkpoint folders without a training run: real manifests over small files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moepp_megatron.config import Config, parse_config
from moepp_megatron.training.checkpoint import Progress
from moepp_megatron.training.checkpoint.files import checkpoint_name, file_digest, manifest
from moepp_megatron.training.checkpoint.progress import SavedRecord

RAW: dict[str, dict[str, Any]] = {
    "run": {"dir": "unused"},
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "seq_length": 16,
        "vocab_size": 64,
    },
    "moe": {"num_ffn_experts": 4},
    "optimizer": {"lr": 1.0e-3},
    "training": {"train_iters": 10, "global_batch_size": 8, "micro_batch_size": 2},
}


def config_of(**sections: dict[str, Any]) -> Config:
    """`RAW` with some settings changed."""
    names = {*RAW, *sections}
    return parse_config({name: RAW.get(name, {}) | sections.get(name, {}) for name in names})


@pytest.fixture
def write() -> Callable[..., Path]:
    """Writes a checkpoint: `write(folder, step, saved_at, **sections)`."""

    def write_checkpoint(
        folder: Path, step: int, saved_at: float | None = None, **sections: dict[str, Any]
    ) -> Path:
        path = folder / checkpoint_name(step)
        path.mkdir(parents=True)
        record = SavedRecord(Progress(step, step * 8, step * 128), {}, {}, saved_at or float(step))
        contents = {
            "__0_0.distcp": b"tensors" * 100,
            ".metadata": b"index",
            "metadata.json": b"{}",
            "config.yaml": config_of(**sections).to_yaml().encode(),
            "state.json": record.to_json(),
        }
        for name, content in contents.items():
            (path / name).write_bytes(content)
        digests = {name: file_digest(path / name) for name in contents}
        sizes = {name: len(content) for name, content in contents.items()}
        (path / "integrity.json").write_bytes(manifest(digests, sizes))
        return path

    return write_checkpoint
