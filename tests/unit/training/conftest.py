"""Checkpoint folders without a training run: real manifests over small files."""

import subprocess

import pytest

from moepp_megatron.config import parse_config
from moepp_megatron.training.checkpoint.files import (
    Progress,
    SavedRecord,
    checkpoint_name,
    file_digest,
    manifest,
)
from moepp_megatron.training.run_folder import Start
from tests.parallel.training_runs import merged, settings

NEW, RESUME, OVERWRITE = Start(), Start(resume=True), Start(overwrite=True)
by_start = pytest.mark.parametrize(
    "start", [NEW, RESUME, OVERWRITE], ids=["", "resume", "overwrite"]
)


def config_of(**sections):
    """A small configuration with some settings changed."""
    small = {"model": {"num_layers": 2}, "moe": {"num_ffn_experts": 4}}
    return parse_config(settings(**merged(small, sections)))


@pytest.fixture
def write():
    """Writes a checkpoint: `write(folder, step, saved_at, **sections)`."""

    def write_checkpoint(folder, step, saved_at=None, **sections):
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
        files = {name: (file_digest(path / name), len(data)) for name, data in contents.items()}
        (path / "integrity.json").write_bytes(manifest(files))
        return path

    return write_checkpoint


@pytest.fixture
def dead():
    """A number that no process has any more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid
