"""The expert usage of a training: the same in every layout; shifts of real text are found."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.file_names import USAGE_FILE
from moepp_megatron.observe.shift.detector import ROWS
from moepp_megatron.observe.shift.tokens import GROUPS, group_of
from tests.parallel.ranks import RankPools
from tests.parallel.shift_runs import begin, watch
from tests.parallel.test_token_groups import SourcedTokens
from tests.parallel.training_runs import CP2, EP2, PP2, TP2, SyntheticDataset, short, watching

GUARD = {"shift": {"window": 2}}
# Token ids and sources are judged after fewer steps.
SOON = mock.patch.dict(
    ROWS,
    tokens=replace(ROWS["tokens"], fewest=10, judged=20),
    source=replace(ROWS["source"], judged=20),
)


@dataclass
class Watched:
    """What one rank saw.

    Attributes:
        usages: Each window's usage and selections of its last step, as counts.
        states: The collectors' state behind each step.
        loss: Mean and spread of the first batch's losses.
        tokens: Tokens of each group of ids, of each step.
    """

    usages: list[Any] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)
    loss: tuple[float, float] = (0.0, 0.0)
    tokens: list[Any] = field(default_factory=list)


def usages(raw: dict[str, Any], steps: int) -> Watched:
    """Usage and losses of a training.

    Every odd step ends in a restart: another collector goes on from the state of the one before.
    """
    from moepp_megatron.config import parse_config
    from moepp_megatron.training.expert_usage import ExpertUsageCollector, token_classes
    from moepp_megatron.training.parts.batch_losses import BatchLosses
    from moepp_megatron.training.routing_shift import TokenCounts
    from moepp_megatron.training.step import training_step

    dataset = SyntheticDataset(parse_config(raw), steps)
    config, layout, model, routing, batches = begin(raw, dataset)
    tokens = TokenCounts(config.model.vocab_size)
    classes = token_classes(dataset, config.model.vocab_size)
    found = Watched()
    collector = ExpertUsageCollector(config, model, routing, classes)
    for step in range(1, steps + 1):
        routing.reset()
        losses = BatchLosses()
        tokens.begin()

        def watcher(chunk: Any, batch: Any, token_losses: Any, losses: Any = losses) -> None:
            losses.add(batch, token_losses)
            tokens.add(batch)

        result = training_step(model, batches, config, layout, watching(watcher, tokens))
        found.tokens.append(tokens.end().tolist())
        if step == 1:
            loss = losses.sum_up(result)
            found.loss = (loss.mean, loss.spread)
        usage = collector.end_step()
        assert (usage is None) == (step % 2 == 1)
        if usage is not None:
            assert usage.shapes == collector.shapes
            # What the run logs is counted apart from the cells.
            found.usages.append((usage.as_json(), routing.selections().tolist()))
        found.states.append(collector.state_dict())
        if step % 2 == 1:
            collector = ExpertUsageCollector(config, model, routing, classes)
            collector.load_state_dict(json.loads(json.dumps(found.states[-1])))
    return found


LAYOUTS = [PP2 | EP2, TP2 | CP2]


def test_usage_and_losses_are_those_of_one_process(ranks: RankPools) -> None:
    (one,) = ranks(1).run(usages, short(routing_guard=GUARD), 4)
    tokens = 4 * 16
    for usage, _ in one.usages:
        experts, cells = (np.array(usage[name]) for name in ("experts", "cells"))
        assert (experts.sum(axis=1) == 2 * 2 * tokens).all()
        assert (cells[..., 1].sum(axis=1) == 2 * tokens).all()
        assert (cells[..., 0].sum(axis=1) == experts[:, :8].sum(axis=1)).all()
        assert (cells[..., 1].reshape(-1, 4, 4).sum(axis=2) == tokens / 2).all(), "positions"
        classes = cells[0, :, 1].reshape(4, 4).sum(axis=0) / (2 * tokens)
        # Of 64 token ids the most frequent has an eighth of the tokens.
        assert (abs(classes - 0.25) < 0.13).all(), "each class holds about a quarter"
    assert [state["steps"] for state in one.states] == [1, 0, 1, 0]
    # Half a window, and the selections that the run logs in its second half.
    for (usage, logged), half in zip(one.usages, one.states[::2], strict=True):
        sums = np.array(half["profile"]["experts"]) + np.array(logged)
        assert sums.tolist() == usage["experts"]
    samples = SyntheticDataset(parse(short(routing_guard=GUARD)), 4)
    for step, found in enumerate(one.tokens):
        batch = [samples[4 * step + place] for place in range(4)]
        ids = np.concatenate([each["labels"][each["loss_mask"] > 0].numpy() for each in batch])
        assert found == np.bincount(group_of(ids), minlength=GROUPS).tolist()
    mean, spread = one.loss
    assert 0.0 < spread < mean
    for parallel in LAYOUTS:
        made = ranks(4).run(usages, short(routing_guard=GUARD, parallel=parallel), 4)
        for each in made:
            assert (each.usages, each.states) == (one.usages, one.states)
            assert each.tokens == one.tokens
            assert each.loss == made[0].loss, "to the same bits on every rank"
        assert made[0].loss[0] == pytest.approx(mean, rel=1e-5)
        if "context_parallel_size" not in parallel:
            assert made[0].loss[1] == pytest.approx(spread, rel=1e-4)


def untold(raw: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Shapes with a model whose layers do not know their tokens; what counts before it is asked."""
    import torch

    from moepp_megatron.config import parse_config
    from moepp_megatron.moe.layer import moe_statistics
    from moepp_megatron.training.expert_usage import ExpertUsageCollector
    from moepp_megatron.training.step import training_step

    dataset = SyntheticDataset(parse_config(raw), 4)
    config, layout, model, routing, batches = begin(raw, dataset)
    routing.reset()
    training_step(model, batches, config, layout)
    counted = [statistics.cells for statistics in moe_statistics(model.models[0]).values()]
    tags = getattr(model.models[0], "token_tags", None)
    collector = ExpertUsageCollector(config, model, routing, torch.zeros(64).long().numpy())
    for _ in range(2):
        routing.reset()
        training_step(model, batches, config, layout)
        usage = collector.end_step()
    assert usage is not None
    assert usage.experts.sum() == 2 * 2 * 2 * 4 * 16
    return usage.shapes, counted, tags


def test_nothing_is_counted_that_nobody_asked_for(ranks: RankPools) -> None:
    ((shapes, counted, tags),) = ranks(1).run(untold, short(routing_guard=GUARD))
    assert shapes == ((2, 12), (2, 16, 2))
    assert (counted, tags) == ([None] * 2, None)


def test_another_language_is_told_within_five_steps(ranks: RankPools) -> None:
    """A small model that has learnt from one language for 56 steps."""
    ((readings, story),) = ranks(1).run(watch, [(1, 56), (2, 6)])
    assert readings[:39] == [None] * 39, "nothing is judged before the warm-up is over"
    assert None not in readings[39:]
    assert max(max(r.routing, r.loss) for r in readings[39:56]) < 0.9
    alarms = [max(r.routing, r.loss) > 1.0 for r in readings[56:]]
    assert True in alarms[:5]
    assert story.cause == "data"
    assert story.steps <= 5
    assert story.moved[0].startswith("loss ")
    assert any("layer" in line for line in story.moved[1:])


def shifted_run(folder: Path, reference: Path | None, steps: int) -> list[tuple[list[Any], Any]]:
    """Readings of a short run and its last state, without and with restarts; writes its profile."""
    from moepp_megatron.config import parse_config
    from moepp_megatron.training.parts.batch_losses import BatchLosses
    from moepp_megatron.training.parts.sources import SourceCollector
    from moepp_megatron.training.routing_shift import RoutingShift
    from moepp_megatron.training.step import training_step

    name = None if reference is None else str(reference)
    shift = {"window": 2, "reference": name, "warmup": 4}
    guard = {"enabled": True, "shift": shift}
    one = {"micro_batch_size": 4}
    raw = short(run={"dir": str(folder)}, routing_guard=guard, training=one)
    dataset = SourcedTokens(parse_config(raw), steps)
    config, layout, model, routing, batches = begin(raw, dataset)
    sources = SourceCollector(config, model, dataset)
    # Both only look on.
    with SOON:
        watchers = [RoutingShift(config, model, routing, dataset) for _ in range(2)]
    losses = BatchLosses()

    def see(chunk: Any, batch: Any, token_losses: Any) -> None:
        losses.add(batch, token_losses)
        sources.see(chunk, batch, token_losses)
        for watcher in watchers:
            watcher.counts.add(batch)

    values: tuple[list[Any], list[Any]] = ([], [])
    for step in range(1, steps + 1):
        routing.reset()
        losses.begin_batch()
        sources.begin_step(step, layout)
        for watcher in watchers:
            watcher.counts.begin()
        loss = losses.sum_up(training_step(model, batches, config, layout, watching(see)))
        for watcher, found in zip(watchers, values, strict=True):
            reading = watcher.end_step(loss, sources.losses())
            found.append(None if reading is None else (reading.metrics, reading.cause))
        if step % 5 == 0:
            state = json.loads(json.dumps(watchers[1].state_dict()))
            with SOON:
                watchers[1] = RoutingShift(config, model, routing, dataset, state)
    watchers[1].write()
    return [(found, w.state_dict()) for found, w in zip(values, watchers, strict=True)]


def test_a_restart_changes_no_bit_and_a_run_can_be_the_reference_of_another(
    ranks: RankPools, tmp_path: Path
) -> None:
    pool = ranks(1)
    ((whole, parts),) = pool.run(shifted_run, tmp_path, None, 44)
    assert whole[0][-1][0].keys() == {
        "routing_shift",
        "loss_shift",
        "token_shift",
        "source_shift",
    }
    assert parts == whole
    path = tmp_path / USAGE_FILE
    assert json.loads(path.read_text())["token_classes"] == whole[1]["token_classes"]
    ((_, (values, state)),) = pool.run(shifted_run, tmp_path, path, 8)
    assert None not in values, "there from the first"
    assert state["token_classes"] == whole[1]["token_classes"]


def resumed_run(state: Any) -> tuple[Any, Any]:
    """State before the first step, and what that tells."""
    from moepp_megatron.training.parts.batch_losses import BatchLosses
    from moepp_megatron.training.routing_shift import RoutingShift
    from moepp_megatron.training.step import training_step

    raw = short(routing_guard=GUARD)
    config, layout, model, routing, batches = begin(raw, SyntheticDataset(parse(raw), 1))
    watcher = RoutingShift(config, model, routing, SourcedTokens(config, 1), state)
    result = training_step(model, batches, config, layout)
    return watcher.state_dict(), watcher.end_step(BatchLosses().sum_up(result))


def parse(raw: dict[str, Any]) -> Any:
    from moepp_megatron.config import parse_config

    return parse_config(raw)


def test_counts_of_other_cells_begin_anew(ranks: RankPools, tmp_path: Path) -> None:
    """A run whose layers were not told their tokens, or an older version, counted fewer."""
    pool = ranks(1)
    # Stopped within its third window.
    (((_, state), _),) = pool.run(shifted_run, tmp_path, None, 5)
    assert state["window"]["steps"] == 1
    ((resumed, _),) = pool.run(resumed_run, state)
    assert resumed == state
    # A checkpoint of before the detector judged steps.
    old = {name: values for name, values in state.items() if name != "windows"}
    ((resumed, value),) = pool.run(resumed_run, old)
    assert resumed["window"]["steps"] == resumed["monitor"]["num_steps"] == 0
    assert value is None
    fewer = state | {"shapes": [[2, 12], [2, 0, 2]]}
    ((resumed, value),) = pool.run(resumed_run, fewer)
    assert resumed["shapes"] == state["shapes"]
    assert resumed["window"]["steps"] == 0
    assert resumed["token_classes"] == state["token_classes"]
    assert value is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"token_classes": "012"}, "vocab_size"),
        ({"token_classes": "9" * 64}, "vocab_size"),
        ({}, "MoE layers"),
    ],
)
def test_the_usage_of_another_model_is_refused(
    changes: dict[str, Any], reason: str, ranks: RankPools, tmp_path: Path
) -> None:
    values = {
        "format": "moepp routing profile 1",
        "experts": [[1] * 12] * 3,
        "cells": [[[1, 2]] * 16] * 3,
        "token_classes": "0" * 64,
        "noise": {"differences": [], "log_distances": []},
    }
    (tmp_path / USAGE_FILE).write_text(json.dumps(values | changes))
    message = ranks(1).run(refused_reference, tmp_path)[0]
    assert "routing_guard.shift.reference" in message
    assert reason in message


def refused_reference(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        shifted_run(folder, folder / USAGE_FILE, 1)
    return str(error.value)
