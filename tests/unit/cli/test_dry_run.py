"""`moepp train --dry-run`: what it prints, and the layouts that it refuses beforehand."""

import importlib.util
import re
import sys

import pytest

from moepp_megatron.runtime.nvml import Nvml, NvmlUnavailableError
from tests import ROOT

MINIMAL = """\
run: {dir: runs/test}
model:
  num_layers: 4
  hidden_size: 64
  ffn_hidden_size: 96
  num_attention_heads: 8
  seq_length: 128
  vocab_size: 512
moe: {num_ffn_experts: 8}
optimizer: {lr: 1e-3}
training: {train_iters: 100, global_batch_size: 16, micro_batch_size: 1}
"""
SHORT = {
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "vpp": "parallel.virtual_pipeline_model_parallel_size",
    "stages": "parallel.pipeline_model_parallel_layout",
    "ep": "parallel.expert_model_parallel_size",
    "etp": "parallel.expert_tensor_parallel_size",
    "cp": "parallel.context_parallel_size",
    "sp": "parallel.sequence_parallel",
}


def _no_card():
    raise NvmlUnavailableError("no NVIDIA driver on this machine", has_driver=False)


@pytest.fixture
def command(tmp_path, monkeypatch, moepp):
    """Runs `moepp train` on the minimal configuration: exit code, stdout and stderr."""
    config = tmp_path / "config.yaml"
    config.write_text(MINIMAL)
    # These tests mean a machine without a card, whatever they run on.
    monkeypatch.setattr("moepp_megatron.cli.memory_fit.Nvml", _no_card)

    def run(text, ranks, *options):
        overrides = []
        for setting in text.split():
            name, _, value = setting.partition("=")
            overrides.append(f"{SHORT.get(name, name)}={value}")
        return moepp("train", config, *overrides, "--nproc", ranks, *options)

    return run


@pytest.fixture
def dry_run(command):
    """The stdout of a dry run, which ends well."""

    def run(text, ranks=1, *options):
        code, out, err = command(text, ranks, "--dry-run", *options)
        assert code == 0, err
        return out

    return run


# Each rule has its rows in tests/unit/config/wrong_settings.txt.
IMPOSSIBLE = [
    ("tp=4 sp=true", 6, "world size (6) must be divisible by", "start 4 or 8 ranks"),
    ("training.micro_batch_size=3", 1, "training.global_batch_size (16) must be", "use 15 or 18"),
]
LEGAL = [
    ("ep=3", 3, "parallel.expert_model_parallel_size to 1, 2, 4 or 8,"),
    ("ep=16", 16, "parallel.expert_model_parallel_size to 1, 2, 4 or 8,"),
    ("ep=2 moe.num_ffn_experts=7", 2, "parallel.expert_model_parallel_size to 1 or 7,"),
    ("ep=2 moe.num_ffn_experts=1", 2, "parallel.expert_model_parallel_size to 1,"),
    # Of 8 heads and 500 tokens; 500 alone has 5 and 10 too.
    ("tp=3 sp=true model.vocab_size=500", 3, "parallel.tensor_model_parallel_size to 1, 2 or 4,"),
    ("pp=3", 3, "parallel.pipeline_model_parallel_size to 1, 2 or 4,"),
    # 96 has 12 divisors: those nearby.
    ("etp=5", 5, "parallel.expert_tensor_parallel_size to 3, 4, 6 or 8,"),
    ("training.micro_batch_size=3", 1, "training.micro_batch_size to 1, 2, 4, 8 or 16,"),
]


@pytest.mark.parametrize(("text", "ranks", "advice"), LEGAL, ids=[case[0] for case in LEGAL])
def test_the_legal_values_of_what_was_set_are_named(command, text, ranks, advice):
    """And each of them is legal: followed, it is not refused for the same reason again."""
    code, _, err = command(text, ranks, "--dry-run")
    assert code == 2
    lines = [line for line in err.splitlines() if advice in line]
    assert lines, advice
    name, _, values = advice.rstrip(",").partition(" to ")
    rule = "must be divisible by " + name
    for value in values.replace(" or ", ", ").split(", "):
        ranks = value if "parallel" in name else 1
        assert rule not in command(f"{text} {name}={value}", ranks, "--dry-run")[2], value


@pytest.mark.parametrize(
    ("text", "ranks", "rule", "remedy"), IMPOSSIBLE, ids=[case[0] for case in IMPOSSIBLE]
)
@pytest.mark.parametrize("options", [("--dry-run",), ()], ids=["dry run", "run"])
def test_impossible_layouts_are_refused(command, text, ranks, rule, remedy, options, monkeypatch):
    """Name, value, rule and remedy on one line, exit status 2, and no rank or group started."""
    from moepp_megatron.runtime import launch

    monkeypatch.setattr(launch, "run_ranks", lambda *args: pytest.fail("ranks were started"))
    had_groups = _has_process_groups()
    code, out, err = command(text, ranks, *options)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if not line.startswith("warning")]
    assert lines[0].startswith("error: ")
    line = next(line for line in lines if rule in line)
    assert re.search(r"\w \(.*\) must .*; \w", line), "name (value) rule; remedy"
    assert remedy in line.partition("; ")[2]
    # Tests before this one may have left groups behind.
    assert _has_process_groups() == had_groups


def _has_process_groups():
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


PLANNED = sorted((ROOT / "configs/h100").glob("*.yaml"))


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_planned_configurations_pass_a_dry_run(path, tmp_path, moepp):
    """On the number of cards in their name; the data folder is the only thing that is missing."""
    cards = path.stem.rpartition("_")[2]
    code, out, err = moepp("train", path, f"data.path={tmp_path}", "--nproc", cards, "--dry-run")
    assert code == 0, err
    assert "data-parallel rank; phi 0." in out


NEEDS_TE = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is here"
)
TRITON = "must have a GPU and the package triton"
LACKING = [
    ("moe.dispatcher=flex ep=2", "moe.dispatcher (flex) must have a GPU and the package deep_ep"),
    ("moe.dispatcher=flex ep=2", "use alltoall"),
    ("moe.fused=true ep=2", f"moe.fused (true) {TRITON}"),
    ("moe.fused=true ep=2", "use auto"),
    ("precision.cross_entropy=fused ep=2", f"precision.cross_entropy (fused) {TRITON}"),
    ("training.cuda_graphs=[attn]", "must be empty without a GPU; use []"),
    pytest.param(
        "training.recompute_granularity=selective training.recompute_modules=[moe_act]",
        "must not hold moe_act without Transformer Engine",
        marks=NEEDS_TE,
    ),
    pytest.param(
        "model.latent_attention.kv_lora_rank=13 sp=true tp=2",
        "kv_lora_rank (13) must, with qk_pos_emb_head_dim added, be divisible by",
        marks=NEEDS_TE,
    ),
    *(
        pytest.param(
            "precision.dtype=bf16 precision.fp8=hybrid precision.fp8_recipe=tensorwise",
            said,
            marks=NEEDS_TE,
        )
        for said in ("(hybrid) must have Transformer Engine and a GPU", "set precision.fp8 to null")
    ),
]


@pytest.mark.parametrize(("text", "said"), LACKING)
def test_what_this_machine_lacks_is_refused_here_and_planned_elsewhere(
    command, dry_run, monkeypatch, text, said
):
    monkeypatch.setattr("moepp_megatron.runtime.fit.have_triton", lambda: False)
    dry_run(text, 2)
    code, _, err = command(text, 2)
    assert code == 3
    assert said in err


def test_what_a_start_would_say_of_the_data_is_said(command, monkeypatch):
    monkeypatch.setattr(
        "moepp_megatron.data.prepared_data.check_data", lambda config, whole_index: ["of the data"]
    )
    code, _, err = command("data.path=x", 1, "--dry-run")
    assert code == 0
    assert "warning: of the data\n" in err


def test_grid_and_stages_are_printed(dry_run):
    out = dry_run("pp=2 stages=E|tt|t|tL ep=2 tp=2 sp=true", 8)
    rows = [re.findall(r"[^\s\u2500-\u257f]+", line) for line in out.splitlines()]
    # Rank 5 of 8: second tensor rank of the second stage's first replica.
    assert ["5", "1", "0", "0", "1", "0", "1", "0"] in rows
    stages = {row[0]: row for row in rows if len(row) > 2 and row[0] in "01" and "|" in row}
    assert stages["0"][2:] == ["E", "|", "3"]
    assert stages["1"][2:] == ["1-2", "|", "4", "L"]


H100 = "precision.dtype=bf16"


@pytest.mark.parametrize("columns", ["", "40", "80"])
@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_nothing_is_cut_in_a_pipe_or_a_narrow_terminal(dry_run, monkeypatch, columns, terminal):
    """Millions with all digits; off a terminal rich takes 80 columns, or those of COLUMNS."""
    monkeypatch.setenv("COLUMNS", columns)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    big = "model.vocab_size=512000 model.hidden_size=8192 model.num_layers=64 pp=16 vpp=4"
    out = re.sub(r"\x1b\[[0-9;]*m", "", dry_run(f"{big} {H100}", 16))
    assert "\u2026" not in out
    # Two matrices [512000, 8192].
    assert re.search(r"^embedding +8,388,608,000$", out, re.MULTILINE)
    # In a terminal of 40 columns the layers continue in a second line.
    layers = "E 1" if terminal and columns == "40" else r"E 1 \| 17 \| 33 \| 49 *$"
    assert re.search(rf"^ +0 +[0-9,]{{11,}} +{layers}", out, re.MULTILINE)


def _rows(out, head):
    """Cells of the table whose head starts with `head`."""
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.split()[:2] == head.split())
    rows = [line.split() for line in lines[first + 2 :]]
    return rows[: next(i for i, row in enumerate(rows) if not row or not row[0][0].isdigit())]


def test_memory_is_that_of_the_card_it_is_meant_for(dry_run):
    """bf16: an H100's, with what `moepp plan` adds; fp32 without a card: a CPU's."""
    out = dry_run(f"{H100} model.hidden_size=4096 model.num_layers=8")
    assert "Memory of a rank on h100_sxm (assumed for precision.dtype bf16" in out
    (row,) = _rows(out, "stage weights")
    assert "sum, GiB" in out
    needed = re.search(r"fullest rank: ([\d.]+) GiB, .*: fits 79.65 GiB less 2%$", out, re.M)
    # Two numbers of two decimals, and 4 GiB for libraries.
    assert float(needed[1]) == pytest.approx(float(row[-1]) + 4.0, abs=0.011)

    out = dry_run("")
    assert "Memory of a rank on this machine's CPU" in out
    assert "sum, MiB" in out
    assert "activations are not estimated on a CPU; --gpu NAME" in out
    # Of fp32 parameters: themselves, gradients and two moments.
    (row,) = _rows(out, "stage weights")
    weights, gradients, moments, whole = map(float, row[1:])
    assert (gradients, moments) == (weights, pytest.approx(2 * weights, abs=0.11))
    assert whole == pytest.approx(4 * weights, abs=0.25)


def test_what_does_not_fit_is_said(dry_run):
    large = f"{H100} model.hidden_size=8192 model.ffn_hidden_size=28672 model.num_layers=32"
    out = dry_run(large)
    needed = float(re.search(r"fullest rank: ([\d.,]+) GiB", out)[1].replace(",", ""))
    assert "DOES NOT FIT 79.65 GiB less 2%" in out
    assert needed > 79.65


@pytest.mark.parametrize(
    ("settings", "options", "device"),
    [
        ("", ("--gpu", "h200"), "h200 (--gpu)"),
        ("", ("--gpu", "h100"), "h100_sxm (--gpu)"),
        (H100, ("--gpu", "cpu"), "this machine's CPU (--gpu)"),
        ("telemetry.hardware=a100_sxm", (), "a100_sxm (telemetry.hardware)"),
        ("telemetry.hardware=a100_sxm", ("--gpu", "h200"), "h200 (--gpu)"),
    ],
)
def test_the_card_is_what_was_asked_for(dry_run, settings, options, device):
    assert f"Memory of a rank on {device}" in dry_run(settings, 1, *options)


def test_the_card_here_comes_before_what_is_assumed(dry_run, monkeypatch):
    """One in `configs/hardware`, and one that nobody has described."""
    from moepp_megatron.cli import memory_fit
    from tests.unit.tools.doctor.fake_nvml import FakeNvml, answers

    def session(name):
        return lambda: Nvml(FakeNvml(answers(nvmlDeviceGetName=name)))

    monkeypatch.setattr(memory_fit, "Nvml", session("NVIDIA H200"))
    assert "on h200 (the GPU here)" in dry_run(H100)
    monkeypatch.setattr(memory_fit, "Nvml", session("Some New Card"))
    assert "the memory of Some New Card is not known" in dry_run(H100)


def test_a_card_is_asked_for_only_where_nothing_runs(command):
    for options, said in (
        (["--gpu", "h200"], "--gpu (h200) must come with --dry-run"),
        (["--dry-run", "--gpu", "h900"], "hardware (h900) must be a known name"),
    ):
        code, _, err = command("", 1, *options)
        assert code == 2
        assert said in err


@pytest.mark.parametrize(("ranks", "rows"), [(1, 1), (16, 16), (32, 14), (1024, 14)])
def test_long_grids_are_abbreviated(dry_run, ranks, rows):
    out = dry_run("training.global_batch_size=1024", ranks)
    grid = _rows(out, "rank tp")
    assert [row[0] for row in grid] == [str(rank) for rank in range(rows)]
    if ranks > rows:
        rest = [line.split() for line in out.splitlines()]
        after = rest.index(["..."] * 8)
        assert rest[after + 1][0] == str(ranks - 1)


def test_the_schedule_is_said(dry_run):
    wsd = "optimizer.warmup_iters=10 optimizer.decay_style=WSD optimizer.wsd_decay_iters=20"
    shown = dry_run(f"{wsd} training.batch_ramp=[[0,8],[81920,16]]", 2)
    *_, title, rates, sizes = shown.splitlines()
    assert title == "Schedule (optimizer.decay_style WSD)"
    assert rates.startswith("learning rate  0.0001 at step 1, 0.001 at step 10, 0.001 at step 25, ")
    assert rates.endswith(", 0.001 at step 75, 0 at step 100")
    # 80 steps of 8 sequences of 128 tokens, then 20 of 16.
    assert sizes == "batch          8 sequences, 16 from step 81; 122,880 tokens in all"
