"""A refused batch changes nothing on any rank; many in a row are dealt with by their cause."""

import functools
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from moepp_megatron.observe.alerts import read_alerts
from moepp_megatron.observe.metrics import read_metrics
from tests.parallel.guard_runs import NEW_FROM
from tests.parallel.resilience_runs import (
    Fault,
    copy_as_of,
    run_trainer,
    trainer_settings,
    why_it_fails,
)
from tests.parallel.training_runs import EP2, PP2

pytestmark = pytest.mark.parallel

Sections = dict[str, dict[str, Any]]

# Ranks and sections; the fault is on the last rank.
LAYOUTS = {
    "ep2 bf16": (2, {"parallel": EP2, "precision": {"dtype": "bf16"}}),
    "ep2 plain optimizer": (2, {"parallel": {**EP2, "use_distributed_optimizer": False}}),
    "pp2": (2, {"parallel": PP2}),
}
# Jitter draws random numbers in every forward pass.
NOISY = {"moe": {"num_ffn_experts": 8, "input_jitter_eps": 0.1, "balance_scope": "global"}}
GUARD = {"guard_max_consecutive_skips": 3, "guard_threshold": 5.0}
SKIPPED = ["skip_batch"] * 3


def _train(ranks, world_size, raw, *args, **named):
    ranks(world_size).run(run_trainer, raw, *args, **named)
    return list(read_metrics(Path(raw["run"]["dir"]) / "metrics.jsonl"))


def _assert_same(run, other):
    """Every recorded number but times is equal, to the bit."""
    fields = ("step", "tokens", "loss", "lr", "grad_norm", "balance_loss", "layer_expert_share")
    for name in fields:
        assert [getattr(r, name) for r in run] == [getattr(r, name) for r in other], name


def _told(folder):
    return [alert.action for alert in read_alerts(folder / "alerts.jsonl")]


@pytest.mark.parametrize("guard", [True, False])
def test_a_batch_without_tokens_to_learn_from(ranks, tmp_path, guard):
    sections = {"resilience": {"guard": guard}, "training": {"train_iters": 3}}
    run = _train(ranks, 1, trainer_settings(tmp_path, **sections), data="masked")
    assert [record.loss == record.loss for record in run] == [True, guard, True]
    told = [a for a in read_alerts(tmp_path / "alerts.jsonl") if a.rule == "numerical_guard"]
    assert [alert.action for alert in told] == ["skip_batch"] * guard
    assert all(alert.condition.startswith("none of its tokens has a loss") for alert in told)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_refused_batches_leave_no_trace(ranks, tmp_path, layout):
    """A run with every fault is one without a guard whose data lack what was refused or undone.

    Checkpoints are of every second step. Batches 3 (a spike) and 10 (NaN) are skipped. The model is
    damaged before batch 6, which undoes batch 5, and before 12, right behind a checkpoint. Batches
    16 to 18 have infinite gradients: the model is sound; the run ends, and a resume continues it.
    """
    world_size, sections = LAYOUTS[layout]
    sections = {**sections, **NOISY, "training": {"train_iters": 8}}
    raw = trainer_settings(
        tmp_path / "run",
        **sections,
        resilience=GUARD,
        checkpoint={"save_interval": 2, "load": "auto"},
    )
    faults = {
        "spike": (3,),
        "large weights": (6,),
        "loss": (10,),
        "nan weight": (12,),
        "gradient": (16, 17, 18),
    }
    planted = tuple(Fault(kind, world_size - 1, batches) for kind, batches in faults.items())
    ended = "3 batches in a row refused .*the model is sound; step 7 is saved"
    for message in ranks(world_size).run(why_it_fails, raw, (), planted):
        assert re.search(ended, message)
    run = _train(ranks, world_size, raw)
    lacking = (3, 5, 6, 7, 8, 10, 12, 13, 14, 16, 17, 18)
    off = trainer_settings(tmp_path / "off", **sections, resilience={"guard": False})
    clean = _train(ranks, world_size, off, lacking)
    _assert_same(run, clean)
    assert [record.skipped_steps for record in run] == [None, None, None, 1, 4, 5, 8, 11]
    assert [record.skipped_steps for record in clean] == [None] * 8
    # "warn": never three in a row, but three of eight.
    assert _told(tmp_path / "run") == [
        *("skip_batch", "skip_batch", "skip_batch", "warn", "skip_batch", "rollback"),
        *("skip_batch", "skip_batch", "warn", "skip_batch", "skip_batch", "rollback"),
        *("skip_batch", "warn", "skip_batch", "skip_batch", "stop"),
    ]


def test_without_the_guard_the_fault_is_fatal(ranks, tmp_path):
    """The faults of this file do harm: NaN reaches the parameters where nothing refuses it."""
    sections = {"resilience": {"guard": False}, "training": {"train_iters": 3}}
    faults = (Fault("loss", 0, (1,)),)
    run = _train(ranks, 1, trainer_settings(tmp_path, **sections), (), faults)
    assert [record.loss == record.loss for record in run] == [True, False, False]


# The losses of this data set fall by learning, so that other texts are a spike.
LEARNS = {
    "optimizer": {"lr": 1.0e-2, "decay_style": "constant"},
    "checkpoint": {"load": "auto"},
}
OTHER_TEXTS = {"data": "other texts", "corpus": "prose"}
# World size and configuration of a run in a folder of its own.


def _learning(folder, layout, steps, resilience):
    one_rank = (1, {"training": {"micro_batch_size": 8}})
    world_size, sections = LAYOUTS.get(layout, one_rank)
    raw = trainer_settings(folder, **sections, **LEARNS, resilience=resilience)
    raw["training"]["train_iters"] = steps
    return world_size, raw


@pytest.fixture(scope="module")
def learnt(ranks, tmp_path_factory):
    """By layout, the folder of a run that was saved one step before its data change."""

    @functools.cache
    def run(layout):
        folder = tmp_path_factory.mktemp("learnt")
        world_size, raw = _learning(folder, layout, NEW_FROM - 1, GUARD)
        raw["checkpoint"]["save_interval"] = NEW_FROM - 1
        ranks(world_size).run(run_trainer, raw, **OTHER_TEXTS)
        return folder

    return run


@pytest.fixture
def continues(learnt, tmp_path):
    """Copies a run that has learnt, to continue to its fourth step with new data."""

    def continued(layout, **resilience):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        shutil.copytree(learnt(layout), folder)
        return _learning(folder, layout, NEW_FROM + 4, {**GUARD, **resilience})

    return continued


def run_with_another_cause(raw, **named):
    """A run in which rank 1's processor comes to another cause."""
    import torch.distributed as dist

    from moepp_megatron.training.parts import refused_batches

    original = refused_batches._find_cause

    def find_cause(*args):
        found = original(*args)
        return replace(found, cause="targets") if dist.get_rank() == 1 else found

    with mock.patch.object(refused_batches, "_find_cause", find_cause):
        return run_trainer(raw, **named)


@pytest.mark.parametrize("layout", ["one rank", "ep2 bf16", "pp2"])
def test_new_data_are_taken(ranks, continues, layout):
    """Three batches are refused, and the rest is a run whose data lack these three.

    So is one that pauses, whether or not it was stopped among the refused batches. Rank 0 decides.
    """
    world_size, raw = continues(layout)
    ranks(world_size).run(run_with_another_cause, raw, **OTHER_TEXTS)
    run = list(read_metrics(Path(raw["run"]["dir"]) / "metrics.jsonl"))
    assert _told(Path(raw["run"]["dir"])) == [*SKIPPED, "accept"]
    world_size, raw = continues(layout, guard=False)
    lacking = tuple(range(NEW_FROM, NEW_FROM + 3))
    clean = _train(ranks, world_size, raw, lacking, **OTHER_TEXTS)
    assert len(clean) == NEW_FROM + 4
    _assert_same(run, clean)
    for stop_after in (None, NEW_FROM + 2) if layout == "one rank" else ():
        _, raw = continues(layout, guard_new_data="pause")
        folder = Path(raw["run"]["dir"])
        if stop_after is not None:
            ranks(1).run(run_trainer, raw, **OTHER_TEXTS, stop_after=stop_after)
        assert ranks(1).run(run_trainer, raw, **OTHER_TEXTS) == ["paused before new data"]
        assert len(read_metrics(folder / "metrics.jsonl")) == NEW_FROM
        resumed = _train(ranks, 1, raw, **OTHER_TEXTS)
        assert _told(folder) == [*SKIPPED, "pause"]
        _assert_same(resumed, clean)


@pytest.mark.parametrize(
    ("data", "policy", "says"),
    [
        ("other texts", "stop", "the data have changed; step {} is saved.*guard_new_data=accept"),
        ("other targets", "accept", "the texts are as before, but not the labels"),
    ],
)
def test_what_is_not_taken_ends_the_run(on_one_rank, continues, data, policy, says):
    _, raw = continues("one rank", guard_new_data=policy)
    message = on_one_rank(why_it_fails, raw, data=data, corpus="prose")
    assert re.search(says.format(NEW_FROM), message)
    assert (Path(raw["run"]["dir"]) / "checkpoints" / f"step_{NEW_FROM:08}").is_dir()


def test_another_corpus_is_announced(ranks, continues):
    """Resumed with it no batch is refused; with the same one nothing is said."""
    _, raw = continues("one rank")
    folder = Path(raw["run"]["dir"])
    raw["checkpoint"]["save_interval"] = raw["training"]["train_iters"] = NEW_FROM
    ranks(1).run(run_trainer, raw, **OTHER_TEXTS)
    assert _told(folder) == []
    raw["training"]["train_iters"] = NEW_FROM + 2
    run = _train(ranks, 1, raw, data="other texts", corpus="code")
    assert run[NEW_FROM].loss > 3 * run[NEW_FROM - 1].loss
    assert _told(folder) == ["both guards start again"]


def test_no_checkpoint_to_go_back_to(ranks, tmp_path):
    raw = trainer_settings(tmp_path, resilience=GUARD, training={"train_iters": 6})
    faults = (Fault("loss", 1, tuple(range(2, 40))),)
    for message in ranks(2).run(why_it_fails, raw, (), faults):
        assert re.search("3 batches in a row after step 2 .*loss is nan on rank 1", message)


def test_rollbacks_that_do_not_help_end_the_run(on_one_rank, tmp_path):
    raw = trainer_settings(
        tmp_path,
        resilience={**GUARD, "guard_max_rollbacks": 2},
        training={"train_iters": 6, "micro_batch_size": 8},
        checkpoint={"save_interval": 1},
    )
    faults = (Fault("loss", 0, tuple(range(2, 40))),)
    message = on_one_rank(why_it_fails, raw, (), faults)
    assert re.search(r"2 rollbacks .* got no further", message)


def test_a_resumed_run_remembers_the_losses_before(ranks, tmp_path):
    """Batch 5 is a spike; the resumed run has seen one loss of its own, too few to tell."""
    sections = {
        **NOISY,
        "resilience": GUARD,
        "checkpoint": {"save_interval": 4, "load": "auto"},
        "training": {"train_iters": 6, "micro_batch_size": 8},
    }
    faults = (Fault("spike", 0, (5,)),)
    run = _train(ranks, 1, trainer_settings(tmp_path / "a", **sections), (), faults)
    copy_as_of(4, tmp_path / "a", tmp_path / "b")
    resumed = _train(ranks, 1, trainer_settings(tmp_path / "b", **sections), (), faults)
    _assert_same(resumed, run)
    assert [r.skipped_steps for r in resumed] == [r.skipped_steps for r in run]
    assert resumed[-1].skipped_steps == 1
