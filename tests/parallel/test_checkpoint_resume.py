"""A run that is stopped and resumed on the same layout is the run that was not, bit for bit."""

import pytest

from tests.parallel.checkpoint_runs import logged, run_trainer, trainer_of, trainer_settings
from tests.parallel.training_runs import EP2, TP2

LAYOUTS = {
    "one": (1, {}),
    "ep2": (2, EP2),
    "tp2": (2, TP2),
    "dp2 overlapped": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
}
# Noise on the router's input: equal losses prove that the random states were restored.
NOISE = {"num_ffn_experts": 8, "input_jitter_eps": 0.01}


# Each layout one way by default, and one of them both.
WAYS = {"one": [False], "ep2": [False, True], "tp2": [True], "dp2 overlapped": [True]}
OTHER_WAYS = {"one": [True], "tp2": [False], "dp2 overlapped": [False]}


@pytest.mark.parametrize(
    ("layout", "ways"),
    [
        *WAYS.items(),
        *(pytest.param(*case, marks=pytest.mark.matrix) for case in OTHER_WAYS.items()),
    ],
)
def test_two_and_two_steps_are_four(ranks, corpus, tmp_path, layout, ways):
    world_size, parallel = LAYOUTS[layout]

    def run(name, steps, **sections):
        training = {"train_iters": steps, "micro_batch_size": 8 // world_size}
        sections |= {"moe": NOISE, "parallel": parallel, "training": training}
        raw = trainer_settings(corpus, tmp_path / name, optimizer={"warmup_iters": 1}, **sections)
        return ranks(world_size).run(run_trainer, raw)[0]

    run("whole", 4)
    for is_async in ways:
        name = f"async {is_async}"
        checkpoint = {"save_interval": 1, "async_save": is_async, "load": "auto"}
        run(name, 2, checkpoint=checkpoint)
        messages = run(name, 4, checkpoint=checkpoint)

        assert logged(tmp_path / name) == logged(tmp_path / "whole")
        assert logged(tmp_path / name, "grad_norm") == logged(tmp_path / "whole", "grad_norm")
        assert not [line for line in messages if "skipping" in line or "seeded again" in line]
        folder = tmp_path / name / "checkpoints"
        assert sorted(path.name for path in folder.iterdir()) == [
            "latest",
            *(f"step_{step:08d}" for step in (1, 2, 3, 4)),
        ]
        assert (folder / "latest").read_text() == "step_00000004\n"


def draw_in_every_step(raw):
    """Draw from Python's and NumPy's generators in each step of a run, as a library would."""
    import random
    from unittest import mock

    import numpy as np

    from moepp_megatron.training import trainer

    drawn = []
    step = trainer.training_step

    def draw(*args):
        drawn.append((random.random(), float(np.random.random())))
        return step(*args)

    with mock.patch.object(trainer, "training_step", draw):
        run_trainer(raw)
    return drawn


def test_python_and_numpy_draw_the_same_again(ranks, corpus, tmp_path):
    checkpoint = {"save_interval": 2, "load": "auto"}

    def drawn(run, steps, **sections):
        training = {"train_iters": steps, "micro_batch_size": 8, **sections.pop("training", {})}
        sections["training"] = training
        raw = trainer_settings(corpus, tmp_path / run, optimizer={"warmup_iters": 0}, **sections)
        return ranks(1).run(draw_in_every_step, raw)[0]

    whole = drawn("whole", 4)
    assert len({number for pair in whole for number in pair}) == 8
    assert drawn("again", 1) == whole[:1]
    assert drawn("other", 1, training={"seed": 8}) != whole[:1]
    parts = [drawn("run", steps, checkpoint=checkpoint) for steps in (2, 4)]
    assert parts == [whole[:2], whole[2:]]


def judge_while_pruning(raw):
    """Phase, checkpoint and part of each look into one, on this rank."""
    from unittest import mock

    from moepp_megatron.training.checkpoint import read, retention
    from moepp_megatron.training.checkpoint.files import damage

    trainer = trainer_of(raw)
    looks = []

    def look(checkpoint, part=0, num_parts=1):
        looks.append((trainer.supervisor.activity.now.phase, checkpoint.name, num_parts))
        return damage(checkpoint, part, num_parts)

    with mock.patch.object(read, "damage", look), mock.patch.object(retention, "damage", look):
        trainer.run()
    return looks


@pytest.mark.parametrize("is_async", [False, True])
def test_all_ranks_look_into_checkpoints_of_before(ranks, corpus, tmp_path, is_async):
    """Hashing takes minutes: on one rank the others would wait in their next step."""
    checkpoint = {"save_interval": 1, "keep": 2, "load": "auto"}

    def raw(steps, **more):
        sections = {"training": {"train_iters": steps}}
        sections["checkpoint"] = checkpoint | more
        return trainer_settings(corpus, tmp_path / "run", optimizer={"warmup_iters": 0}, **sections)

    ranks(2).run(run_trainer, raw(2))
    looks = ranks(2).run(judge_while_pruning, raw(4, async_save=is_async))
    expected = [("save", f"step_{step:08d}", 2) for step in (2, 1)]
    assert looks == [expected, expected]
