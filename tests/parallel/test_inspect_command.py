"""`moepp inspect` on real checkpoints: every layout records the same, and the command."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moepp_megatron.config import ConfigError
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.tools.inspection.request import InspectRequest
from tests.commands import moepp, succeeded
from tests.parallel.checkpoint_runs import run_trainer, trainer_settings
from tests.parallel.training_runs import VANILLA

WINDOW = 16


@pytest.fixture(scope="module")
def run(ranks, corpus, tmp_path_factory):
    """A run with a checkpoint after two steps, and dense layers between MoE layers."""
    folder = tmp_path_factory.mktemp("inspected") / "run"
    raw = trainer_settings(
        corpus,
        folder,
        model={"seq_length": WINDOW, "num_layers": 4},
        moe={"layer_freq": [1, 0, 1, 1]},
        training={"train_iters": 2, "micro_batch_size": 8},
        optimizer={"warmup_iters": 0, "lr": 0.05},
        checkpoint={"save_interval": 2},
    )
    ranks(1).run(run_trainer, raw)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    # Several windows, the last one not full; some data-parallel ranks get a filler.
    path.write_text("Document 7: words 49 and lines; more words, \u00e4ndere W\u00f6rter.\n" * 2)
    return path


def checkpoint(run, step=2):
    return run / "checkpoints" / f"step_{step:08d}"


def trace(checkpoint, text, overrides):
    """Rank 0's trace of the checkpoint's model on the ranks that call."""
    import torch.distributed as dist

    from moepp_megatron.tools.inspection.record import trace_model

    out = text.with_suffix(".html")
    request = InspectRequest.read(checkpoint, text, out, overrides, dist.get_world_size())
    trace = trace_model(request)
    if trace is None:
        return None
    return {name: getattr(trace, name) for name in ("selected", "gates", "losses")}


@pytest.fixture(scope="module")
def alone(ranks, run, text):
    return ranks(1).run(trace, checkpoint(run), text, [])[0]


def test_one_process_records_every_token(alone, run, text):
    count = len(Tokenizer.load(checkpoint(run)).encode(text.read_text()))
    assert count > 2 * WINDOW
    assert count % WINDOW != 0
    assert alone["selected"].shape == alone["gates"].shape == (3, count, 2)
    assert (np.diff(alone["gates"], axis=2) <= 0).all()
    # Softmax over twelve experts: the two largest.
    assert (alone["gates"].sum(axis=2) > 2 / 12).all()
    assert np.isnan(alone["losses"]).nonzero()[0].tolist() == list(range(0, count, WINDOW))
    assert len(np.unique(alone["selected"])) > 6


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.tensor_model_parallel_size=2", "parallel.expert_model_parallel_size=2"],
        ["parallel.pipeline_model_parallel_size=2"],
        ["parallel.context_parallel_size=2"],
    ],
    ids=["tp2 ep2", "pp2", "cp2"],
)
def test_every_layout_records_the_same(ranks, run, text, alone, overrides):
    split, nothing = ranks(2).run(trace, checkpoint(run), text, overrides)
    assert nothing is None
    assert np.array_equal(split["selected"], alone["selected"])
    # fp32 sums in another order, through four layers.
    np.testing.assert_allclose(split["gates"], alone["gates"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(split["losses"], alone["losses"], rtol=1e-5, atol=1e-5)


def test_the_command(run, text, alone, tmp_path):
    arguments = ["--text", text, "--out", tmp_path / "page.html", "--json", tmp_path / "all.json"]
    done = succeeded(moepp("inspect", checkpoint(run), *arguments))
    page, numbers = (line.split()[-1] for line in done.stdout.splitlines()[-2:])
    assert (page, numbers) == (str(tmp_path / "page.html"), str(tmp_path / "all.json"))
    assert "is read in windows of 16 (model.seq_length)" in done.stderr
    assert "Which tokens take which experts" in Path(page).read_text(encoding="ascii")
    content = json.loads(Path(numbers).read_text())
    assert content["layers"] == [1, 3, 4]
    assert content["selected"] == alone["selected"].tolist()
    assert content["label"].endswith("step 2")
    assert content["tokens"]["class"].count("number") > 0


def refused(checkpoint, text, **options):
    with pytest.raises(ConfigError) as caught:
        InspectRequest.read(checkpoint, text, text.parent / "o.html", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_requests_are_refused(run, text, tmp_path):
    folder = checkpoint(run)
    assert "moe.tau must be in section parallel" in refused(folder, text, overrides=["moe.tau=1"])
    assert "must be a checkpoint folder or a run" in refused(tmp_path, text)
    (tmp_path / "empty").write_text("")
    assert "must hold some text, and is empty" in refused(folder, tmp_path / "empty")


def test_a_vanilla_checkpoint_is_refused_with_the_reason(run, text, tmp_path):
    config = (checkpoint(run) / "config.yaml").read_text()
    vanilla = tmp_path / "vanilla"
    shutil.copytree(checkpoint(run), vanilla)
    for key, value in VANILLA.items():
        lines = [
            f"  {key}: {str(value).lower()}" if line.strip().startswith(f"{key}:") else line
            for line in config.splitlines()
        ]
        config = "\n".join(lines) + "\n"
    (vanilla / "config.yaml").write_text(config)
    line = refused(vanilla, text)
    assert f"checkpoint ({vanilla}) must have zero-computation experts" in line
    assert "every token takes 2 FFN experts" in line
