"""Blends and stages in training: what a resumed run draws, what guards see, losses by name."""

import functools
import json
from pathlib import Path
from unittest import mock

import pytest

from moepp_megatron.observe.alerts import read_alerts
from tests.parallel.checkpoint_runs import logged, run_trainer, trainer_settings
from tests.unit.data.letters import prepare_letters

STEPS = 6
# Checkpoints are written where stages begin, before they do.
BEGINS = (2, 4)
KILLED_AT = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Section `data`: three folders, three stages."""
    folder = tmp_path_factory.mktemp("letters")
    web, code, math = (
        str(prepare_letters(folder, name, all=letter))
        for name, letter in (("web", "a"), ("code", "b"), ("math", "c"))
    )
    return {
        "blend": [{"path": web, "weight": 3.0}, {"path": code, "weight": 1.0}],
        "stages": [
            {"from_step": 2, "blend": [{"path": code, "weight": 1.0}]},
            # 4 steps of 8 sequences of 16 tokens.
            {
                "from_tokens": 512.0,
                "blend": [{"path": web, "weight": 1.0}, {"path": math, "weight": 1.0}],
            },
        ],
        "validation": {"seen": web, "elsewhere": math},
    }


class Killed(Exception):
    """Stands for a kill: nothing is saved."""


def run_and_read(raw, killed_at=None):
    """Train; the tokens of each micro-batch that this rank has trained on, in order."""
    from moepp_megatron.training import trainer

    read = []
    make, step = trainer.rank_batches, trainer.training_step
    steps = 0

    def recorded(iterator):
        for batch in iterator:
            read.append(batch["tokens"].tolist())
            yield batch

    def counted(*args):
        nonlocal steps
        steps += 1
        if steps == killed_at:
            raise Killed
        return step(*args)

    with (
        mock.patch.object(trainer, "rank_batches", lambda *a: [recorded(i) for i in make(*a)]),
        mock.patch.object(trainer, "training_step", counted),
    ):
        try:
            run_trainer(raw)
        except Killed:
            assert killed_at is not None
    return read


def raw_of(data, run, **sections):
    training = {"train_iters": STEPS, "eval_iters": 1, "eval_interval": 3, "micro_batch_size": 4}
    raw = trainer_settings(Path("unused"), run, training=training, **sections)
    return raw | {"data": data}


def stages_of(run):
    alerts = [alert for alert in read_alerts(run / "alerts.jsonl") if alert.rule == "new_stage"]
    return [(alert.step, alert.condition) for alert in alerts]


@pytest.fixture(scope="module")
def unbroken(ranks, data, tmp_path_factory):
    """Return what each rank reads in a run that nothing interrupts, and the run's folder."""

    @functools.cache
    def run(ranks_of_run):
        folder = tmp_path_factory.mktemp("unbroken")
        return ranks(ranks_of_run).run(run_and_read, raw_of(data, folder)), folder

    return run


@pytest.mark.parametrize("ranks_of_run", [1, 2])
def test_killed_and_resumed_is_unbroken(ranks, data, unbroken, tmp_path, ranks_of_run):
    pool, per_step = ranks(ranks_of_run), 2 // ranks_of_run
    whole, folder = unbroken(ranks_of_run)
    checkpoint = {"save_interval": 2, "load": "auto"}
    raw = raw_of(data, tmp_path / "run", checkpoint=checkpoint)
    before = pool.run(run_and_read, raw, KILLED_AT)
    after = pool.run(run_and_read, raw)
    for rank in range(ranks_of_run):
        assert len(whole[rank]) == STEPS * per_step
        assert before[rank] == whole[rank][: (KILLED_AT - 1) * per_step]
        assert after[rank] == whole[rank][2 * per_step :]
        # Batches differ, but for a few that lie wholly in runs of one letter.
        assert len({json.dumps(batch) for batch in whole[rank]}) >= 0.9 * STEPS * per_step
    assert logged(tmp_path / "run") == logged(folder)
    assert logged(tmp_path / "run", "source_loss") == logged(folder, "source_loss")

    told = stages_of(folder)
    assert [step for step, _ in told] == list(BEGINS)
    assert "data.stages[1] begins: 50.0% " in told[1][1]
    # The first is announced again: the checkpoint was written before it.
    assert stages_of(tmp_path / "run") == [told[0], told[0], told[1]]


def test_losses_by_source_and_by_set(unbroken):
    _, folder = unbroken(1)
    losses = logged(folder, "source_loss")
    assert [sorted(each) for each in losses[:2]] == [["code", "web"]] * 2
    assert [sorted(each) for each in losses[2:4]] == [["code"]] * 2
    assert [sorted(each) for each in losses[4:]] == [["math", "web"]] * 2
    shares = logged(folder, "source_ffn_share")
    assert all(0 < share < 1 for each in shares for share in each.values())

    sets = logged(folder, "valid_set_loss")
    assert [step for step, each in enumerate(sets, 1) if each] == [3, 6]
    assert sorted(sets[-1]) == ["elsewhere", "seen"]
    whole = logged(folder, "valid_loss")[-1]
    # What has been trained on from the beginning is known better.
    assert sets[-1]["seen"] < sets[-1]["elsewhere"]
    assert whole is not None
    assert whole != sets[-1]["seen"]


def test_a_rollback_over_a_stage_begins_it_again():
    """A checkpoint of the stage before restores its baselines, while the data have gone on."""
    from moepp_megatron.config import parse_config
    from moepp_megatron.features.data_stages.part import DataStagesPart

    parts = [{"path": "a", "weight": 1.0}], [{"path": "b", "weight": 1.0}]
    raw = trainer_settings(Path("unused"), Path("unused"))
    raw["data"] = {"blend": parts[0], "stages": [{"from_step": 4, "blend": parts[1]}]}
    with mock.patch("moepp_megatron.features.data_stages.part.corpus_identity", str):
        stages = DataStagesPart(parse_config(raw), 0)
        saved = stages.state()
        assert stages.new_data(0) is None
        assert stages.new_data(31) is None
        assert stages.new_data(32) == "data.stages[0] begins: b"
        assert stages.new_data(40) is None
        stages.load(saved, "rollback", 6)
        assert stages.new_data(48) == "data.stages[0] begins: b"
        resumed = DataStagesPart(parse_config(raw), 48)
        resumed.load(stages.state(), "resume", 6)
        assert resumed.new_data(48) is None
        other = DataStagesPart(parse_config(raw), 0)
        other.load({"corpus": "z"}, "resume", 0)
        assert other.new_data(0) == "data.blend holds another corpus or split than before"
