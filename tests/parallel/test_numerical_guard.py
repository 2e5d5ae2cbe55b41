"""A refused step changes nothing on any rank; many in a row lead back to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moepp_megatron.observe.metrics import StepMetrics, read_metrics
from tests.parallel.ranks import RankError, RankPools
from tests.parallel.resilience_runs import Fault, run_trainer, trainer_settings

pytestmark = pytest.mark.parallel

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


@pytest.mark.parametrize("kind", ["loss", "gradient", "spike"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_skipped_batch_leaves_no_trace(
    ranks: RankPools, tmp_path: Path, layout: str, kind: str
) -> None:
    world_size, sections = LAYOUTS[layout]
    sections = {**sections, **NOISY, "resilience": GUARD, "training": _iterations(6)}
    fault = Fault(kind, world_size - 1, (3, 5))
    run = _train(ranks, world_size, trainer_settings(tmp_path / "a", **sections), (), fault)
    clean = _train(ranks, world_size, trainer_settings(tmp_path / "b", **sections), (3, 5))
    _assert_same(run, clean)
    assert [record.skipped_steps for record in run] == [None, None, None, 1, 2, 2]
    assert [record.skipped_steps for record in clean] == [None] * 6


def test_without_the_guard_the_fault_is_fatal(ranks: RankPools, tmp_path: Path) -> None:
    """The faults of this file do harm: NaN reaches the parameters where nothing refuses it."""
    sections = {"resilience": {"guard": False}, "training": _iterations(6)}
    fault = Fault("loss", 0, (3,))
    run = _train(ranks, 1, trainer_settings(tmp_path, **sections), (), fault)
    assert [record.loss == record.loss for record in run] == [True] * 3 + [False] * 3


def test_the_guard_changes_no_number_of_a_healthy_run(ranks: RankPools, tmp_path: Path) -> None:
    sections = {**NOISY, "training": _iterations(4)}
    raw = trainer_settings(tmp_path / "on", **sections)
    off = trainer_settings(tmp_path / "off", **sections, resilience={"guard": False})
    _assert_same(_train(ranks, 1, raw), _train(ranks, 1, off))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rollback_skips_the_data_between(ranks: RankPools, tmp_path: Path, layout: str) -> None:
    """Checkpoint after batches 0 and 1; 3 to 5 are bad; so the run goes on with batch 6."""
    world_size, sections = LAYOUTS[layout]
    sections = {
        **sections,
        **NOISY,
        "resilience": GUARD,
        "training": _iterations(5),
        "checkpoint": {"save_interval": 2},
    }
    fault = Fault("loss", world_size - 1, (3, 4, 5))
    run = _train(ranks, world_size, trainer_settings(tmp_path / "a", **sections), (), fault)
    clean = _train(ranks, world_size, trainer_settings(tmp_path / "b", **sections), (2, 3, 4, 5))
    _assert_same(run, clean)
    assert run[-1].skipped_steps == 3


def test_no_checkpoint_to_go_back_to(ranks: RankPools, tmp_path: Path) -> None:
    raw = trainer_settings(tmp_path, resilience=GUARD, training=_iterations(6))
    with pytest.raises(RankError, match="3 steps in a row after step 2 .*loss is nan on rank 1"):
        ranks(2).run(run_trainer, raw, (), Fault("loss", 1, tuple(range(2, 40))))


def test_rollbacks_that_do_not_help_end_the_run(ranks: RankPools, tmp_path: Path) -> None:
    raw = trainer_settings(
        tmp_path,
        resilience={**GUARD, "guard_max_rollbacks": 2},
        training=_iterations(6),
        checkpoint={"save_interval": 1},
    )
    with pytest.raises(RankError, match=r"2 rollbacks .* got no further"):
        ranks(1).run(run_trainer, raw, (), Fault("loss", 0, tuple(range(2, 40))))


def _iterations(count: int) -> dict[str, Any]:
    return {"train_iters": count, "global_batch_size": 8, "micro_batch_size": 2, "seed": 7}
