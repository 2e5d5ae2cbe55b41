"""Folders of a run that machines do not share are found before the model is built."""

import pytest

from moepp_megatron.config import parse_config
from moepp_megatron.training.checkpoint.find import NoStartError
from moepp_megatron.training.run_folder import RunFolder
from tests.parallel.training_runs import settings


def refusal(runs, checkpoints):
    import torch.distributed as dist

    rank = dist.get_rank()
    own = {"run": {"dir": str(runs[rank])}, "checkpoint": {"dir": str(checkpoints[rank])}}
    try:
        RunFolder(parse_config(settings(**own))).refuse_unshared(looks=True)
    except NoStartError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("blind", "setting"), [(0, "run.dir"), (1, "checkpoint.dir")])
def test_every_rank_refuses(ranks, tmp_path, blind, setting):
    """Each rank stands for a machine; of one folder they mean two of their own."""
    pairs = [[tmp_path / name, tmp_path / name] for name in ("run", "elsewhere")]
    for folder in (tmp_path / "run", tmp_path / "elsewhere", tmp_path / "local"):
        folder.mkdir()
    assert ranks(2).run(refusal, *pairs) == [None, None]
    pairs[blind][1] = tmp_path / "local"
    assert ranks(2).run(refusal, pairs[0], ["s3://bucket/run"] * 2) == [None, None]
    for said in ranks(2).run(refusal, *pairs):
        assert said.startswith(f"{setting} (")
        assert "must be one folder for all machines" in said
    assert [path for folder in tmp_path.iterdir() for path in folder.iterdir()] == []
