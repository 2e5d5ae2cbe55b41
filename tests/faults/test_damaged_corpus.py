"""A corpus that damage has reached: said in one line, before ranks start or a token is used."""

import random
import shutil
from pathlib import Path

import pytest

from tests.faults.harness import losses, training, write_config

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]


def errors_of(folder, data, num_ranks):
    """Exit status, error lines and all output of a run on `data`."""
    config = write_config(folder / "config.yaml", data, folder / "run", num_ranks)
    with training(config, num_ranks) as process:
        status = process.wait()
    log = config.with_suffix(".log").read_text()
    return status, [line for line in log.splitlines() if line.startswith("error: ")], log


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_tokens_outside_of_the_vocabulary(tmp_path, data, num_ranks):
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    size = (folder / "corpus.bin").stat().st_size
    (folder / "corpus.bin").write_bytes(random.Random(0).randbytes(size))
    status, errors, log = errors_of(tmp_path, folder, num_ranks)
    assert status == 2, log
    # Each rank reads its own samples.
    assert 1 <= len(errors) <= num_ranks
    for error in errors:
        assert f"error: data.path ({folder}) is damaged: token " in error
        assert "outside of the vocabulary (0 to 319)" in error
    assert "IndexError" not in log
    assert losses(tmp_path / "run") == {}


def test_damaged_index_is_refused_before_ranks_start(tmp_path, data):
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    index = bytearray((folder / "corpus.idx").read_bytes())
    index[34:200] = random.Random(0).randbytes(166)
    (folder / "corpus.idx").write_bytes(index)
    status, errors, log = errors_of(tmp_path, folder, 2)
    assert status == 2
    assert errors == log.splitlines()
    assert len(errors) == 1
    assert "is damaged: corpus.idx is wrong about document 0" in errors[0]
