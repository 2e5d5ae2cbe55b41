"""A refused batch changes nothing on any rank; many in a row are dealt with by their cause."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moepp_megatron.observe.alerts import read_alerts
from moepp_megatron.observe.metrics import StepMetrics, read_metrics
from tests.parallel.ranks import RankError, RankPools
from tests.parallel.resilience_runs import Fault, run_trainer, trainer_settings

pytestmark = pytest.mark.parallel

Taken = Callable[[str], list[StepMetrics]]

# Ranks, layout and precision; the fault is on the last rank.
LAYOUTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "one rank": (1, {}),
    "ep2": (2, {"parallel": {"expert_model_parallel_size": 2}}),
    "pp2": (2, {"parallel": {"pipeline_model_parallel_size": 2}}),
    "dp2 bf16 distributed optimizer": (2, {"precision": {"dtype": "bf16"}}),
    "ep2 plain optimizer": (
        2,
        {"parallel": {"expert_model_parallel_size": 2, "use_distributed_optimizer": False}},
    ),
}
# Jitter draws random numbers in every forward pass; a window of 8 judges from the third loss on.
NOISY = {"moe": {"num_ffn_experts": 8, "input_jitter_eps": 0.1, "balance_scope": "global"}}
GUARD = {"guard_window": 8, "guard_max_consecutive_skips": 3}


def _train(ranks: RankPools, world_size: int, raw: dict[str, Any], *args: Any) -> list[StepMetrics]:
    ranks(world_size).run(run_trainer, raw, *args)
    return read_metrics(Path(raw["run"]["dir"]) / "metrics.jsonl")


def _assert_same(run: list[StepMetrics], other: list[StepMetrics]) -> None:
    """Every recorded number but times is equal, to the bit."""
    fields = ("step", "tokens", "loss", "lr", "grad_norm", "balance_loss", "layer_expert_share")
    for name in fields:
        assert [getattr(r, name) for r in run] == [getattr(r, name) for r in other], name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_skipped_batches_leave_no_trace(ranks: RankPools, tmp_path: Path, layout: str) -> None:
    """One batch of each kind; the run without the three shows any trace of any of them."""
    world_size, sections = LAYOUTS[layout]
    sections = {**sections, **NOISY, "resilience": GUARD, "training": _iterations(6)}
    kinds = {"spike": 3, "loss": 5, "gradient": 7}
    faults = tuple(Fault(kind, world_size - 1, (batch,)) for kind, batch in kinds.items())
    run = _train(ranks, world_size, trainer_settings(tmp_path / "a", **sections), (), faults)
    without = tuple(kinds.values())
    clean = _train(ranks, world_size, trainer_settings(tmp_path / "b", **sections), without)
    _assert_same(run, clean)
    assert [record.skipped_steps for record in run] == [None, None, None, 1, 2, 3]
    # Never two in a row, but three of eight.
    assert _told(tmp_path / "a") == [*["skip_batch"] * 3, "warn"]
    assert [record.skipped_steps for record in clean] == [None] * 6


def test_without_the_guard_the_fault_is_fatal(ranks: RankPools, tmp_path: Path) -> None:
    """The faults of this file do harm: NaN reaches the parameters where nothing refuses it."""
    sections = {"resilience": {"guard": False}, "training": _iterations(6)}
    faults = (Fault("loss", 0, (3,)),)
    run = _train(ranks, 1, trainer_settings(tmp_path, **sections), (), faults)
    assert [record.loss == record.loss for record in run] == [True] * 3 + [False] * 3


def test_the_guard_changes_no_number_of_a_healthy_run(ranks: RankPools, tmp_path: Path) -> None:
    sections = {**NOISY, "training": _iterations(4)}
    raw = trainer_settings(tmp_path / "on", **sections)
    off = trainer_settings(tmp_path / "off", **sections, resilience={"guard": False})
    _assert_same(_train(ranks, 1, raw), _train(ranks, 1, off))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_model_goes_back(ranks: RankPools, tmp_path: Path, layout: str) -> None:
    """Checkpoint after batches 0 to 3; damage before 5, so 5 to 7 are bad, and 8 is next."""
    world_size, sections = LAYOUTS[layout]
    sections = {
        **sections,
        **NOISY,
        "resilience": GUARD,
        "training": _iterations(7),
    }
    clean = trainer_settings(tmp_path / "clean", **sections)
    expected = _train(ranks, world_size, clean, (4, 5, 6, 7))
    for kind in ("nan weight", "large weights"):
        raw = trainer_settings(tmp_path / kind, **sections, checkpoint={"save_interval": 4})
        run = _train(ranks, world_size, raw, (), (Fault(kind, world_size - 1, (5,)),))
        _assert_same(run, expected)
        assert run[-1].skipped_steps == 3, kind
        assert _told(tmp_path / kind)[-1] == "rollback"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_that_are_not_finite_end_the_run_saved(
    ranks: RankPools, tmp_path: Path, layout: str
) -> None:
    """The model is as it was before them: nothing is gone back, and resuming goes on after them."""
    world_size, sections = LAYOUTS[layout]
    sections = {
        **sections,
        **NOISY,
        "resilience": GUARD,
        "training": _iterations(5),
    }
    checkpoint = {"save_interval": 2, "load": "auto"}
    raw = trainer_settings(tmp_path / "a", **sections, checkpoint=checkpoint)
    faults = (Fault("gradient", world_size - 1, (3, 4, 5)),)
    with pytest.raises(
        RankError, match="3 batches in a row refused .*the model is sound; step 3 is saved"
    ):
        ranks(world_size).run(run_trainer, raw, (), faults)
    assert _told(tmp_path / "a") == [*["skip_batch"] * 3, "stop"]
    run = _train(ranks, world_size, raw)
    clean = _train(ranks, world_size, trainer_settings(tmp_path / "b", **sections), (3, 4, 5))
    _assert_same(run, clean)


# The losses of this data set fall by learning, so that other texts are a spike.
LEARNS = {
    "optimizer": {"lr": 1.0e-2, "decay_style": "constant"},
    "training": {"train_iters": 30, "global_batch_size": 8, "micro_batch_size": 4, "seed": 7},
}
OTHER_TEXTS = ((), (), "other texts")


@pytest.fixture(scope="module")
def taken(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Taken:
    """By layout, the run that takes new data."""

    @functools.cache
    def run(layout: str) -> list[StepMetrics]:
        world_size, sections = LAYOUTS[layout]
        folder = tmp_path_factory.mktemp("taken")
        raw = trainer_settings(folder, **sections, **LEARNS, resilience=GUARD)
        run = _train(ranks, world_size, raw, *OTHER_TEXTS)
        assert _told(folder) == [*["skip_batch"] * 3, "accept"]
        return run

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_new_data_are_taken(ranks: RankPools, tmp_path: Path, taken: Taken, layout: str) -> None:
    """From batch 24 on: three are refused, and the rest is a run whose data lack these three."""
    world_size, sections = LAYOUTS[layout]
    raw = trainer_settings(tmp_path, **sections, **LEARNS, resilience={"guard": False})
    clean = _train(ranks, world_size, raw, (24, 25, 26), *OTHER_TEXTS[1:])
    assert len(clean) == 30
    _assert_same(taken(layout), clean)


@pytest.mark.parametrize("stop_after", [None, 26])
def test_pause_before_new_data(
    ranks: RankPools, tmp_path: Path, taken: Taken, stop_after: int | None
) -> None:
    """Resumed it takes them; that it was stopped among the refused batches makes no difference."""
    resilience = {**GUARD, "guard_new_data": "pause"}
    sections = {**LEARNS, "resilience": resilience, "checkpoint": {"load": "auto"}}
    raw = trainer_settings(tmp_path, **sections)
    if stop_after is not None:
        ranks(1).run(run_trainer, raw, *OTHER_TEXTS, stop_after)
    assert ranks(1).run(run_trainer, raw, *OTHER_TEXTS) == ["paused before new data"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 24
    run = _train(ranks, 1, raw, *OTHER_TEXTS)
    assert _told(tmp_path) == [*["skip_batch"] * 3, "pause"]
    _assert_same(run, taken("one rank"))


@pytest.mark.parametrize(
    ("data", "policy", "says"),
    [
        ("other texts", "stop", "the data have changed; step 24 is saved.*guard_new_data=accept"),
        ("other targets", "accept", "the texts are as before, but not the labels"),
    ],
)
def test_what_is_not_taken_ends_the_run(
    ranks: RankPools, tmp_path: Path, data: str, policy: str, says: str
) -> None:
    raw = trainer_settings(tmp_path, **LEARNS, resilience={**GUARD, "guard_new_data": policy})
    with pytest.raises(RankError, match=says):
        ranks(1).run(run_trainer, raw, (), (), data)
    assert (tmp_path / "checkpoints" / "step_00000024").is_dir()


def test_another_corpus_is_announced(ranks: RankPools, tmp_path: Path) -> None:
    """Resumed with it no batch is refused; with the same one nothing is said."""
    checkpoint = {"load": "auto", "save_interval": 40}
    sections = {**LEARNS, "resilience": GUARD, "checkpoint": checkpoint}
    raw = trainer_settings(tmp_path, **sections)
    raw["training"]["train_iters"] = 20
    ranks(1).run(run_trainer, raw, *OTHER_TEXTS, None, "prose")
    raw["training"]["train_iters"] = 24
    ranks(1).run(run_trainer, raw, *OTHER_TEXTS, None, "prose")
    assert _told(tmp_path) == []
    raw["training"]["train_iters"] = 30
    run = _train(ranks, 1, raw, *OTHER_TEXTS, None, "code")
    assert run[24].loss > 3 * run[23].loss
    assert _told(tmp_path) == ["both guards begin anew"]


def _told(folder: Path) -> list[str]:
    return [alert.action for alert in read_alerts(folder / "alerts.jsonl")]


def test_no_checkpoint_to_go_back_to(ranks: RankPools, tmp_path: Path) -> None:
    raw = trainer_settings(tmp_path, resilience=GUARD, training=_iterations(6))
    with pytest.raises(RankError, match="3 batches in a row after step 2 .*loss is nan on rank 1"):
        ranks(2).run(run_trainer, raw, (), (Fault("loss", 1, tuple(range(2, 40))),))


def test_rollbacks_that_do_not_help_end_the_run(ranks: RankPools, tmp_path: Path) -> None:
    raw = trainer_settings(
        tmp_path,
        resilience={**GUARD, "guard_max_rollbacks": 2},
        training=_iterations(6),
        checkpoint={"save_interval": 1},
    )
    with pytest.raises(RankError, match=r"2 rollbacks .* got no further"):
        ranks(1).run(run_trainer, raw, (), (Fault("loss", 0, tuple(range(2, 40))),))


def _iterations(count: int) -> dict[str, Any]:
    return {"train_iters": count, "global_batch_size": 8, "micro_batch_size": 4, "seed": 7}


def test_a_resumed_run_remembers_the_losses_before(ranks: RankPools, tmp_path: Path) -> None:
    """Batch 5 is a spike; the resumed run has seen one loss of its own, too few to tell."""
    sections = {
        **NOISY,
        "resilience": GUARD,
        "optimizer": {"lr": 1.0e-3, "decay_iters": 6},
        "checkpoint": {"save_interval": 4, "load": "auto"},
    }
    faults = (Fault("spike", 0, (5,)),)
    unbroken = trainer_settings(tmp_path / "a", **sections, training=_iterations(6))
    first = trainer_settings(tmp_path / "b", **sections, training=_iterations(4))
    second = trainer_settings(tmp_path / "b", **sections, training=_iterations(6))
    run = _train(ranks, 1, unbroken, (), faults)
    _train(ranks, 1, first, (), faults)
    resumed = _train(ranks, 1, second, (), faults)
    _assert_same(resumed, run)
    assert [r.skipped_steps for r in resumed] == [r.skipped_steps for r in run]
    assert resumed[-1].skipped_steps == 1
