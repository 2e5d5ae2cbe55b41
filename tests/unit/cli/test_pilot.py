"""`moepp pilot` before its first run, as a user calls it."""

from functools import partial

import pytest

from moepp_megatron.tools.experiments import runner
from moepp_megatron.tools.experiments.runner import Interrupted, RunFailed
from tests.unit.tools.experiments.pilot.synthetic import config_of


@pytest.fixture
def pilot(tmp_path, moepp):
    """Runs `moepp pilot` on a tiny configuration: exit code, stdout and stderr."""
    config = tmp_path / "tiny.yaml"
    config.write_text(config_of().to_yaml())
    return partial(moepp, "pilot", config, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "3"], "--steps (3) must be at least 8"),
        ([], "data.path (null) must name a prepared folder"),
        (["data.path=nowhere"], "data.path (nowhere) must be a prepared folder"),
        (["--nproc", "3"], "training.global_batch_size (4)"),
        (
            ["moe.num_zero_experts=0", "moe.num_copy_experts=0", "moe.num_constant_experts=0"],
            "must not all be 0, because a pilot compares MoE++ with vanilla",
        ),
    ],
)
def test_everything_is_refused_before_the_first_run(pilot, tmp_path, options, said):
    code, _, error = pilot(*options)
    assert code == 2
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_folder_of_a_training_run_is_refused(pilot, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text("records")
    code, _, error = pilot("--collect")
    assert code == 2
    assert error.endswith(
        f"error: --out ({out}) must not be the folder of a training run, but holds metrics.jsonl; "
        "choose another\n"
    )
    assert [path.name for path in out.iterdir()] == ["metrics.jsonl"]


def test_collect_leaves_a_configuration_for_every_run(pilot, tmp_path):
    code, out, err = pilot("--collect", "--seeds", "2")
    assert code == 0
    names = sorted(file.stem for file in (tmp_path / "out/configs").iterdir())
    # Vanilla, MoE++ and the short one.
    assert len(names) == 6
    assert "moepp-seed-7" in names
    assert out.startswith("2 seeds of 5 models, vanilla for 120 steps (9,600 tokens)")
    assert "6 runs and sessions are missing: start them where the models train" in err
    file = tmp_path / "out/configs/moepp-seed-7.yaml"
    assert f"  moepp train {file} --nproc 1\n" in err
    assert "no seed is finished by every model yet" in err
    assert not (tmp_path / "out/pilot.json").exists()


@pytest.mark.parametrize(("error", "status"), [(Interrupted(), 75), (RunFailed("run x failed"), 1)])
def test_exit_codes(pilot, monkeypatch, error, status):
    def ends(*_, **__):
        raise error

    monkeypatch.setattr(runner, "run_trial", ends)
    monkeypatch.setattr("moepp_megatron.data.prepared_data.check_data", lambda config: [])
    code, _, told = pilot("--steps", "8")
    assert code == status
    assert str(error) in told
