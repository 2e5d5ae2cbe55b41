"""A whole pilot, from real runs to its answer."""

import json
import sys
from pathlib import Path

import pytest

from moepp_megatron.cli import main
from moepp_megatron.tools.experiments import runner
from tests.parallel.training_runs import join

CONFIG = """\
run: {{dir: unused, name: tiny}}
model:
  num_layers: 2
  hidden_size: 32
  ffn_hidden_size: 48
  num_attention_heads: 2
  seq_length: 16
  vocab_size: 300
moe: {{num_ffn_experts: 4, balance_coeff: 0.05}}
data: {{path: {data}}}
optimizer: {{lr: 1.0e-3, warmup_iters: 2}}
training: {{train_iters: 8, global_batch_size: 2, micro_batch_size: 1}}
"""


def train(path):

    from moepp_megatron.config import load_config
    from moepp_megatron.training.trainer import Trainer

    config = load_config(path)
    layout = join(config)
    Trainer(config, layout).run()


def bench(path, overrides, out):

    from moepp_megatron.config import load_config
    from moepp_megatron.runtime.atomic import write_json
    from moepp_megatron.tools.bench.step import run_step_benchmark

    config = load_config(path, overrides)
    layout = join(config)
    write_json(Path(out), run_step_benchmark(config, layout, rounds=2))


def test_pilot_from_runs_to_answer(ranks, corpus, tmp_path, monkeypatch, capsys):
    config, out = tmp_path / "tiny.yaml", tmp_path / "pilot"
    config.write_text(CONFIG.format(data=corpus))
    trained = []
    timed = []

    def on_test_ranks(options, module, arguments):
        """The ranks that are there already, since a process takes seconds to start."""
        assert options.num_local_ranks == 1
        if arguments[0] == "bench":
            _, _, config, *overrides = arguments
            end = overrides.index("--rounds")
            ranks(1).run(bench, config, overrides[:end], overrides[-1])
            timed.append(overrides[:end])
            return 0
        ranks(1).run(train, arguments[-1])
        trained.append(Path(arguments[-1]).stem)
        return 0

    monkeypatch.setattr(runner, "run_ranks", on_test_ranks)
    monkeypatch.setattr("moepp_megatron.tools.experiments.pilot.arms._FEWEST_EVAL_ITERS", 1)

    def pilot():
        words = ["pilot", str(config), "training.seed=5", "precision.dtype=bf16"]
        monkeypatch.setattr(sys, "argv", ["moepp", *words, "--out", str(out), "--seeds", "2"])
        with pytest.raises(SystemExit) as ended:
            main.run()
        assert ended.value.code == 0
        return capsys.readouterr().out

    said = pilot()
    assert said.startswith("2 seeds of 5 models, vanilla for 8 steps (256 tokens)")
    # Two more arms follow once MoE++ was timed, at the share that its runs had.
    assert len(trained) == 10
    assert len(timed) == 5
    assert all(words[0].startswith("moe.tau=") for words in timed)
    result = json.loads((out / "pilot.json").read_text())
    # Nothing is decided by two seeds.
    assert (result["seeds"], result["look"], result["next_seeds"]) == ([5, 6], 0, 5)
    assert result["sentence"] == "Undecided: nothing is decided before 5 seeds."
    vanilla, moepp = result["arms"][:2]
    assert vanilla["ffn_share"]["mean"] == 1.0
    assert moepp["ffn_share"]["mean"] < 1.0
    # The difference is that of the runs' own records.
    last = {
        (arm, seed): json.loads(
            (out / "runs" / f"{arm}-seed-{seed}" / "metrics.jsonl").read_text().splitlines()[-1]
        )["valid_loss"]
        for arm in ("vanilla", "moepp")
        for seed in (5, 6)
    }
    pairs = [last["moepp", seed] - last["vanilla", seed] for seed in (5, 6)]
    assert moepp["loss_difference"]["mean"] == pytest.approx(sum(pairs) / 2)
    assert moepp["loss_difference"]["high"] is not None
    assert result["sentence"] in (out / "pilot.html").read_text()
    # Nothing is left to do; the results are written anew from what is there.
    (out / "pilot.json").unlink()
    pilot()
    assert len(trained) == 10
    assert json.loads((out / "pilot.json").read_text()) == result
