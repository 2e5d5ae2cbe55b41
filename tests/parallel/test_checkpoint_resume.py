"""A run that is stopped and resumed on the same layout is the run that was not, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.checkpoint_runs import logged, run_trainer, trainer_settings
from tests.parallel.ranks import RankPools

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "dp2 overlapped": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
}
# Noise on the router's input: equal losses prove that the random states were restored.
NOISE = {"num_ffn_experts": 8, "input_jitter_eps": 0.01}


def _cases() -> list[Any]:
    """Every layout both ways; by default each layout one way and one of them both."""
    default = [("one", False), ("ep2", False), ("ep2", True), ("tp2", True)]
    default += [("dp2 overlapped", True)]
    rest = [(layout, way) for layout in LAYOUTS for way in (False, True)]
    return default + [pytest.param(*c, marks=pytest.mark.matrix) for c in rest if c not in default]


@pytest.mark.parametrize(("layout", "is_async"), _cases())
def test_six_and_six_steps_are_twelve(
    ranks: RankPools, corpus: Path, tmp_path: Path, layout: str, is_async: bool
) -> None:
    world_size, parallel = LAYOUTS[layout]
    checkpoint = {"save_interval": 3, "async_save": is_async, "load": "auto"}

    def run(name: str, steps: int, **sections: Any) -> list[str]:
        sections |= {"moe": NOISE, "parallel": parallel, "training": {"train_iters": steps}}
        raw = trainer_settings(corpus, tmp_path / name, **sections)
        return ranks(world_size).run(run_trainer, raw)[0]

    run("whole", 12)
    run("run", 6, checkpoint=checkpoint)
    messages = run("run", 12, checkpoint=checkpoint)

    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    assert logged(tmp_path / "run", "grad_norm") == logged(tmp_path / "whole", "grad_norm")
    assert not [line for line in messages if "skipping" in line or "seeded anew" in line]
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [
        "latest", *(f"step_{step:08d}" for step in (3, 6, 9, 12))
    ]  # fmt: skip
    assert (folder / "latest").read_text() == "step_00000012\n"


def draw_in_every_step(raw: dict[str, Any]) -> list[tuple[float, float]]:
    """What Python's and NumPy's generators give in each step of a run, as a library would draw."""
    import random
    from unittest import mock

    import numpy as np

    from moepp_megatron.training import trainer

    drawn: list[tuple[float, float]] = []
    step = trainer.training_step

    def draw(*args: Any) -> Any:
        drawn.append((random.random(), float(np.random.random())))
        return step(*args)

    with mock.patch.object(trainer, "training_step", draw):
        run_trainer(raw)
    return drawn


def test_python_and_numpy_draw_the_same_again(
    ranks: RankPools, corpus: Path, tmp_path: Path
) -> None:
    checkpoint = {"save_interval": 3, "load": "auto"}

    def drawn(run: str, steps: int, **sections: Any) -> list[tuple[float, float]]:
        sections["training"] = {"train_iters": steps, **sections.pop("training", {})}
        raw = trainer_settings(corpus, tmp_path / run, **sections)
        return ranks(1).run(draw_in_every_step, raw)[0]

    whole = drawn("whole", 6)
    assert len({number for pair in whole for number in pair}) == 12
    assert drawn("again", 6) == whole
    assert drawn("other", 6, training={"seed": 8}) != whole
    parts = [drawn("run", steps, checkpoint=checkpoint) for steps in (3, 6)]
    assert parts == [whole[:3], whole[3:]]
