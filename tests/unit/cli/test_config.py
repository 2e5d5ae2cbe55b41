"""`moepp config`: what a configuration sets and where, and every setting."""

import pytest
from typer.testing import CliRunner

from moepp_megatron.cli import main
from moepp_megatron.config import load_config
from tests import ROOT

QUICKSTART = ROOT / "configs/quickstart.yaml"


def _run(*arguments):
    result = CliRunner().invoke(main.app, ["config", *arguments])
    assert result.exception is None, result.exception
    return result.stdout


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(f"base: {QUICKSTART}\nmoe:\n  tau: 0.25\n  budget: {{gain: 0.5}}\n")
    return path


def test_show_names_the_origin_of_each_value(own):
    lines = {
        line.split("#")[0].strip(): line.partition("# ")[2]
        for line in _run("show", str(own), "optimizer.lr=0.5").splitlines()
    }
    assert lines["tau: 0.25"] == str(own)
    assert lines["gain: 0.5"] == str(own)
    assert lines["lr: 0.5"] == "command line"
    assert lines["num_layers: 4"] == str(QUICKSTART)
    assert lines["rotary_base: 10000.0"] == "default"


def test_what_show_prints_is_the_configuration(own, tmp_path):
    printed = tmp_path / "printed.yaml"
    printed.write_text(_run("show", str(own)))
    assert load_config(printed) == load_config(own)


def test_changed_leaves_out_defaults(own):
    shown = _run("show", str(own), "--changed")
    assert "tau: 0.25" in shown
    assert "default" not in shown
    assert "slurm" not in shown


def test_keys_by_prefix_and_by_a_part_of_the_name():
    shown = _run("keys", "moe.tau")
    assert shown.startswith("moe.tau: number; > 0, <= 10; default 0.75\n    Weight of")
    assert "precision.fp8: choice; e4m3, hybrid, null; default null" in _run("keys", "precision")
    assert "training.micro_batch_size" in _run("keys", "micro_batch")


def test_from_megatron_writes_a_file(tmp_path):
    script, out = tmp_path / "train.sh", tmp_path / "mine.yaml"
    script.write_text("pretrain_gpt.py --num-experts $E --num-layers 2 --odd")
    result = CliRunner().invoke(
        main.app, ["config", "from-megatron", str(script), "E=4", "--out", str(out)]
    )
    assert result.exit_code == 0
    assert "--odd has no counterpart" in result.stderr
    assert "num_ffn_experts: 4" in out.read_text()
