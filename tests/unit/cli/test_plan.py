"""`moepp plan` as a user calls it."""

import json
import re
from functools import partial
from pathlib import Path

import pytest

from moepp_megatron.config import Layout, load_config
from tests import ROOT

CONFIG = """\
run: {dir: runs/test, name: planned}
model:
  num_layers: 8
  hidden_size: 1024
  ffn_hidden_size: 4096
  num_attention_heads: 16
  seq_length: 2048
  vocab_size: 32768
moe: {num_ffn_experts: 8}
precision: {dtype: bf16}
optimizer: {lr: 1e-3}
training: {train_iters: 100, global_batch_size: 64, micro_batch_size: 1}
"""
CONTRACT = {
    "layout",
    "kind",
    "tau",
    "fits",
    "memory_gib",
    "step_time_s",
    "tokens_per_s_per_gpu",
    "tflops_per_gpu",
    "a2a_bytes",
}


@pytest.fixture
def wide(moepp, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return partial(moepp, "plan")


@pytest.fixture
def plan(wide, tmp_path):
    """Runs `moepp plan` on a small configuration: exit code, stdout and stderr."""
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    return partial(wide, config)


def test_table_json_and_layout(plan, tmp_path):
    out, data = tmp_path / "best.yaml", tmp_path / "plan.json"
    files = ("--json", str(data), "--out", str(out))
    prices = ("--price", "2.5", "--tokens", "1e9")
    code, printed, _ = plan("moe.tau=0.5", "--gpus", "16", "--gpu", "h100", *files, *prices)
    assert code == 0
    for text in (
        "legal layouts on 16 h100_sxm",
        "vanilla",
        "MoE++ tau 0.5",
        "money",
        "1.00 billion",
    ):
        assert text in printed
    records = json.loads(data.read_text())
    assert all(record.keys() >= CONTRACT for record in records)
    assert [record["step_time_s"] for record in records] == sorted(
        record["step_time_s"] for record in records
    )
    assert {(record["kind"], record["tau"]) for record in records} >= {
        ("moepp", 0.5),
        ("moepp", 0.25),
        ("vanilla", None),
    }
    written = load_config(out)
    assert written.moe.tau == 0.5
    assert Layout.from_config(written, 16).world_size == 16
    [best] = [record for record in records if record["plan"]]
    assert best["tau"] == 0.5
    run = best["run"]
    assert run["tokens"] == 1e9
    assert run["money"] == pytest.approx(2.5 * 24 * 16 * run["days"])
    assert run["days"] * 86400 * best["tokens_per_s_per_gpu"] * 16 == pytest.approx(1e9)
    # In vanilla's layout, in which a smaller tau is faster too.
    shared = {record["tau"]: record["shared_layout_step_time_s"] for record in records}
    [plain] = [record for record in records if record["kind"] == "vanilla"]
    assert shared[None] is None
    assert plain["step_time_s"] > shared[1.0] > shared[0.25]
    low, high = best["step_time_range_s"]
    assert low < best["step_time_s"] < high
    assert best["layout"]["micro_batch_size"] == written.training.micro_batch_size
    # Model FLOP/s and tokens/s are two sides of the same step.
    assert best["tokens_per_s_per_gpu"] == pytest.approx(64 * 2048 / best["step_time_s"] / 16)


def test_the_written_layout_has_all_overrides(plan, tmp_path):
    """Two in one section inside a section, and a section by its word, as CONFIG may have them."""
    out = tmp_path / "best.yaml"
    budget = ("moe.budget.target_ffn_per_token=1.2", "moe.budget.response=0.01")
    overrides = ("model.num_layers=2", *budget, "routing_guard=safe")
    assert plan(*overrides, "--gpus", "2", "--out", str(out))[0] == 0
    written = load_config(out)
    assert (written.moe.budget.target_ffn_per_token, written.moe.budget.response) == (1.2, 0.01)
    asked = load_config(tmp_path / "config.yaml", overrides)
    assert (
        written.routing_guard
        == asked.routing_guard
        != load_config(tmp_path / "config.yaml").routing_guard
    )


def test_a_ramp_of_the_batch_trains_on_less(plan, tmp_path):
    """10 steps of 32 sequences, until 655,360 tokens are read, then 90 of 64."""
    data = tmp_path / "plan.json"
    ramp = "training.batch_ramp=[[0, 32], [655360, 64]]"
    assert (
        plan("model.num_layers=4", ramp, "--gpus", "2", "--price", "2", "--json", str(data))[0] == 0
    )
    tokens = {record["run"]["tokens"] for record in json.loads(data.read_text())}
    assert tokens == {(10 * 32 + 90 * 64) * 2048}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "11"], "--gpus (11) must allow a legal layout"),
        (["--gpu", "h300"], "hardware (h300) must be a known name"),
        (["--gpu", "cpu"], "hardware (cpu) must give"),
        (["--taus", "0"], "--taus (0) must be a number > 0"),
        (["--price", "-1"], "--price (-1) must be a number above 0"),
        (["--tokens", "inf"], "--tokens (inf) must be a number above 0"),
        (["moe.tau=-1"], "moe.tau"),
        (["precision.fp8=hybrid", "--gpu", "a100"], "precision.fp8 (hybrid) must be a format"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(plan, options, message):
    code, _, error = plan(*options)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_a_model_too_large_is_said_after_the_nearest_misses(plan, tmp_path):
    out = tmp_path / "best.yaml"
    huge = ["model.hidden_size=16384", "model.num_layers=64", "model.ffn_hidden_size=65536"]
    code, printed, error = plan(*huge, "--gpus", "1", "--out", out)
    assert code == 2
    assert "does not fit" in printed
    assert "use more GPUs" in error
    assert not out.exists()


def test_the_configuration_is_not_overwritten(plan, tmp_path):
    config = tmp_path / "config.yaml"
    # Refused before the search: nothing is printed.
    code, printed, error = plan("--out", config)
    assert (code, printed) == (2, "")
    assert f"--out ({config}) must not replace CONFIG, which is read" in error
    assert config.read_text() == CONFIG


def test_the_model_is_held_to_runs(tmp_path, wide):
    from moepp_megatron.tools.planning.measured.compare import SET_NUMBERS

    rows = [one for one in json.loads(SET_NUMBERS.read_text()) if one["hardware"] == "b200"]
    rows[0]["measured"]["peak_memory_gib"] = 100.0
    rows.append({**rows[0], "name": "not measured", "pair": [], "measured": {}})
    rows[-1] |= {"routng": "forced", "colour": "red", "beyond": {"moment_byte": 2}}
    file, data = tmp_path / "rows.json", tmp_path / "errors.json"
    file.write_text(json.dumps(rows))
    code, told, _ = wide("--measured", file, "--json", data)
    assert code == 0
    for text in ("Llama-3 8B MXFP8, 8", "errors of rows in scope in", "ratio: "):
        assert text in told
    for text in ("routng (did you mean routing?)", "moment_byte (did you mean moment_bytes?)"):
        assert text in told
    for text in ("not used: colour, routng", "of not measured"):
        assert text in told
    found = json.loads(data.read_text())
    assert [one["name"] for one in found] == [one["name"] for one in rows]
    assert found[-1]["error"] is None
    for one, row in zip(found[:-1], rows[:-1], strict=True):
        predicted = one["predicted"]
        assert predicted.keys() == {"tokens_per_s_per_gpu", "step_time_s", "peak_memory_gib"}
        measured = row["measured"]["tokens_per_s_per_gpu"]
        assert one["error"] == pytest.approx(predicted["tokens_per_s_per_gpu"] / measured - 1)
        assert one["measured"] == row["measured"]
    for options, says in (
        (["--measured", str(file), "config.yaml"], "must come without CONFIG"),
        (
            ["--measured", str(file), "--gpus", "8", "--taus", "0.5"],
            "must come without --gpus, --taus: rows say what ran; leave",
        ),
        ([], "CONFIG must be given, or --measured FILE"),
        (["--measured", str(tmp_path / "none.json")], "cannot be read"),
    ):
        code, _, error = wide(*options)
        assert code == 2
        assert says in error


@pytest.mark.parametrize("model", ["moepp_7b_16_4", "qwen3_30b_a3b_32"])
def test_readme_has_what_is_printed(model, wide):
    readme = (ROOT / "README.md").read_text()
    [options] = re.findall(r"^moepp plan CONFIG (.+)$", readme, re.M)
    code, printed, _ = wide(ROOT / "configs/models" / f"{model}.yaml", *options.split())
    assert code == 0
    rows = re.findall(r"^  (?:vanilla|MoE\+\+ tau 0.75)  +(.+) \d+\.\d  +([\d,]+)  ", printed, re.M)
    (plain, plain_cost), (ours, our_cost) = ((row.split(), cost) for row, cost in rows)
    shown = f"| {plain[1]} s, {ours[1]} s | {ours[5]}, {ours[6]} | {plain_cost}, {our_cost} |"
    assert f"({Path('configs/models', model)}.yaml) {shown}" in readme
    [error] = re.findall(r"off by .+ published runs \(.+?\)", printed)
    assert error in readme
