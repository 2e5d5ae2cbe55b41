"""Recorded routes repeat a run to the bit in every layout, other ones do not; what files hold."""

from pathlib import Path
from shutil import copy

import numpy as np
import pytest

from moepp_megatron.config import ConfigError
from moepp_megatron.observe.metrics import read_metrics
from tests.parallel.resilience_runs import BATCH, Fault, run_trainer, trainer_settings
from tests.parallel.training_runs import (
    CP2,
    EP2,
    FULL,
    PP2,
    SELECTIVE,
    STEPS,
    TP2,
    VANILLA,
    compare,
    short,
    train,
)

CHUNKS = PP2 | {"virtual_pipeline_model_parallel_size": 2}
LAYOUTS = {
    "one process": (1, {}),
    "tp 2, layers again": (2, {"parallel": TP2, "training": FULL}),
    "ep 2, moe again": (2, {"parallel": EP2, "training": SELECTIVE}),
    "cp 2": (2, {"parallel": CP2}),
    "pp 2, layers again": (2, {"parallel": PP2, "training": FULL}),
    "pp 2, chunks 2, layers again": (
        2,
        {"model": {"num_layers": 4}, "parallel": CHUNKS, "training": FULL},
    ),
    "tp 2, pp 2, ep 2": (4, {"parallel": TP2 | PP2 | EP2}),
    "dense first, capacity": (1, {"moe": {"layer_freq": [0, 1], "capacity_factor": 1.1}}),
    "ep 2, static rows": (2, {"parallel": EP2, "moe": {"static_rows": 4.0}}),
    "ep 2, static rows that overflow": (2, {"parallel": EP2, "moe": {"static_rows": 0.2}}),
    "vanilla, ep 2": (2, {"parallel": EP2, "moe": VANILLA | {"num_ffn_experts": 8}}),
}


def of_step(folder, step, samples=4):
    return folder / f"from_sample_{samples * (step - 1):08d}.npz"


@pytest.fixture
def run(trained):
    return lambda size, routes, **sections: trained(size, short(**sections, routes=routes))


def assert_same(found, expected):
    assert found.losses == expected.losses
    assert found.grad_norms == expected.grad_norms
    assert found.routing == expected.routing
    for name, gradient in expected.gradients.items():
        np.testing.assert_array_equal(found.gradients[name], gradient)


def recorded(folder):
    routes = []
    for step in range(1, STEPS + 1):
        with np.load(of_step(folder, step)) as file:
            routes.append(file["routed_experts"])
    return routes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_replay_is_the_recorded_run(run, tmp_path, layout):
    size, sections = LAYOUTS[layout]
    plain = run(size, {}, **sections)
    assert_same(run(size, {"record": str(tmp_path / "routes")}, **sections), plain)
    replayed = run(size, {"replay": str(tmp_path / "routes")}, **sections)
    assert_same(replayed, plain)

    every = [1] * sections.get("model", {}).get("num_layers", 2)
    layers = sum(sections.get("moe", {}).get("layer_freq", every))
    for step, routes in enumerate(recorded(tmp_path / "routes")):
        assert routes.shape == (4 * 16, layers, 2)
        loads = []
        for column, expected in enumerate(plain.routing[step]["layer_expert_share"]):
            counts = np.bincount(routes[:, column].ravel(), minlength=len(expected))
            np.testing.assert_allclose(counts / counts.sum(), expected, atol=1e-12)
            loads.append(counts[:8].max() / counts[:8].mean())
        assert plain.routing[step]["max_ffn_load"] == pytest.approx(max(loads))


def test_routes_of_one_layout_serve_another(run, tmp_path):
    run(1, {"record": str(tmp_path / "one")})
    layout = {"parallel": TP2 | PP2 | EP2, "training": FULL}
    run(4, {"replay": str(tmp_path / "one"), "record": str(tmp_path / "four")}, **layout)
    for one, four in zip(recorded(tmp_path / "one"), recorded(tmp_path / "four"), strict=True):
        np.testing.assert_array_equal(one, four)
    run(1, {"record": str(tmp_path / "first"), "steps": 1})
    assert [path.name for path in (tmp_path / "first").iterdir()] == ["from_sample_00000000.npz"]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one process"])
def test_other_routes_are_repeated_too(run, tmp_path, layout):
    """Routes that no router selects: as in one process, where layers are not computed again."""
    size, sections = LAYOUTS[layout]
    alone = {name: sections[name] for name in ("model", "moe") if name in sections}
    num_experts = 8 if "vanilla" in layout else 12
    plain = run(1, {"record": str(tmp_path / "own")}, **alone)
    for step, own in enumerate(recorded(tmp_path / "own"), 1):
        (tmp_path / "other").mkdir(exist_ok=True)
        np.savez(of_step(tmp_path / "other", step), routed_experts=(own + 1) % num_experts)
    routes = {"replay": str(tmp_path / "other")}
    reference = run(1, routes, **alone)
    # Sums of fp32 numbers in another order.
    compare(run(size, routes, **sections), reference, 1e-5)
    assert reference.losses != plain.losses
    for name, gradient in reference.gradients.items():
        # Of live gates.
        assert "router" not in name or np.abs(gradient).max() > 0, name


def damaged(path):
    np.savez_compressed(path, routed_experts=np.zeros((64, 2, 2), dtype=int))
    content = bytearray(path.read_bytes())
    content[60:80] = b"\xff" * 20
    path.write_bytes(content)


def one_array(path):
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))


OBJECTS, SHORT = np.array([1, None], dtype=object), np.zeros((63, 2, 2), dtype=int)
NO_FILES = {
    "No such file": Path,
    "it has no array routed_experts": lambda path: np.savez(path, tokens=np.zeros(3)),
    "Object arrays": lambda path: np.savez(path, routed_experts=OBJECTS),
    "64 tokens": lambda path: np.savez(path, routed_experts=SHORT),
    "not named": one_array,
    "not a zip file": lambda path: path.write_text("routes"),
    "decompressing": damaged,
}


def test_what_is_no_file_of_the_step_is_refused(on_one_rank, tmp_path):
    raw, path = short(routes={"replay": str(tmp_path)}), of_step(tmp_path, 1)
    for reason, write in NO_FILES.items():
        write(path)
        line = on_one_rank(refusal, raw)
        assert line.startswith(f"routes.replay ({path}) must be an npz file with this batch's")
        assert reason in line
        assert "\n" not in line
    routes = np.tile(np.array([0, 1]), (64, 2, 1))
    np.savez(path, routed_experts=routes, tokens_sha256="of another run")
    line = on_one_rank(refusal, raw)
    assert line.startswith(f"routes.replay ({path}) must be of this batch's tokens")


def test_a_folder_that_cannot_be_one_is_refused(on_one_rank, tmp_path):
    (tmp_path / "file").touch()
    line = on_one_rank(refusal, short(routes={"record": str(tmp_path / "file")}))
    assert line.startswith(f"routes.record ({tmp_path}/file) must leave")


def test_files_stay_with_their_batches(ranks, tmp_path):
    """Batch 2 is refused; the model is damaged before batch 5, which undoes step 3."""
    faults = (Fault("loss", 0, (1,)), Fault("large weights", 0, (4,)))

    def train_in(name, **routes):
        raw = trainer_settings(
            tmp_path / name,
            training={"train_iters": 5},
            resilience={"guard_max_consecutive_skips": 2, "guard_threshold": 5.0},
            checkpoint={"save_interval": 2, "load": "auto"},
            routes={key: str(tmp_path / folder) for key, folder in routes.items()},
        )
        ranks(1).run(run_trainer, raw, (), faults)
        return list(read_metrics(tmp_path / name / "metrics.jsonl"))

    run = train_in("run", record="routes")
    batches = run[-1].skipped_steps + 6
    names = [of_step(tmp_path / "routes", number + 1, BATCH).name for number in range(batches)]
    assert sorted(path.name for path in (tmp_path / "routes").iterdir()) == names
    replayed = train_in("replay", replay="routes")
    assert [r.loss for r in replayed] == [r.loss for r in run]
    assert [r.layer_expert_share for r in replayed] == [r.layer_expert_share for r in run]

    last = of_step(tmp_path / "routes", batches, BATCH)
    for name, change, reason in (
        ("damaged", lambda: last.write_bytes(last.read_bytes()[:-40]), "npz file"),
        ("others", lambda: copy(of_step(last.parent, batches - 1, BATCH), last), "with others"),
        ("missing", last.unlink, "No such file"),
    ):
        change()
        with pytest.raises(Exception, match=rf"routes.replay \({last}\).*{reason}.*; step 4 is"):
            train_in(name, replay="routes")
        assert (tmp_path / name / "checkpoints/step_00000004").is_dir()


def test_what_cannot_be_written_ends_no_run_unsaved(ranks, tmp_path):
    routes = {"record": str(tmp_path / "routes")}
    raw = trainer_settings(tmp_path / "run", training={"train_iters": 3}, routes=routes)
    of_step(tmp_path / "routes", 2, BATCH).mkdir(parents=True)
    with pytest.raises(Exception, match=r"routes.record: .*; step 2 is saved"):
        ranks(2).run(run_trainer, raw)
    assert (tmp_path / "run/checkpoints/step_00000002").is_dir()


def refusal(raw):
    with pytest.raises(ConfigError) as refused:
        train(raw, 1)
    return str(refused.value)
