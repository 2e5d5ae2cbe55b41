"""Rows of measured runs: their format, the model beside them."""

import json
from dataclasses import replace

import pytest

from moepp_megatron.config.hardware import load_hardware
from moepp_megatron.config.stages import stages_of
from moepp_megatron.tools.planning.machine import Machine
from moepp_megatron.tools.planning.measured.compare import (
    HELD_OUT,
    SET_NUMBERS,
    compare,
    error_range,
    family_errors,
    pair_errors,
)
from moepp_megatron.tools.planning.measured.rows import read_runs
from moepp_megatron.tools.planning.memory import GIB, _memory_of
from moepp_megatron.tools.planning.workload import NumberFormats
from tests import ROOT
from tests.refusals import config_error

DOCS = ROOT / "docs/planning.md"


@pytest.fixture(scope="module")
def chosen_by():
    return [compare(run) for run in read_runs(SET_NUMBERS)]


@pytest.fixture(scope="module")
def shown_on():
    return [compare(run) for run in read_runs(HELD_OUT)]


def rows():
    return [*json.loads(SET_NUMBERS.read_text()), *json.loads(HELD_OUT.read_text())]


def row(which, **changes):
    [found] = [one for one in rows() if one["name"] == which]
    settings = {**found["settings"], **changes.pop("settings", {})}
    return {**found, "settings": settings, **changes}


DEEPSEEK = "DeepSeek-V3 bf16, 1,024, TP2 PP8 VPP4 EP64 HybridEP, no overlap"
QWEN = "Qwen3-30B bf16, 16, EP16 HybridEP, no overlap, balance forced"
LLAMA = "Llama-3 8B FP8 tensorwise, 8, FSDP, 5 of 32 layers recomputed"


def runs_of(tmp_path, *entries):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(entries))
    return read_runs(path)


def test_runs_that_set_no_number_are_met_as_the_docs_say(shown_on):
    # The bounds that the project set itself; what is reached stands in docs/planning.md.
    bounds = {"bf16 MoE": 0.12, "FP8 MoE": 0.12, "B200": 0.15, "dense FP8": 0.12}
    found = family_errors(shown_on)
    assert found.keys() >= bounds.keys()
    for family, bound in bounds.items():
        assert found[family].median <= bound, (family, found[family])


def test_ratios_that_set_numbers_are_met(chosen_by):
    ratios = {pair.name: pair.error for pair in pair_errors(chosen_by)}
    assert len(ratios) >= 4
    assert max(map(abs, ratios.values())) < 0.08, ratios


def test_the_range_of_a_plan_is_that_of_its_family():
    run = read_runs(HELD_OUT)[0]
    h100, b200 = (Machine.of(load_hardware(name)) for name in ("h100_sxm", "b200"))
    of_hopper, of_blackwell = error_range(run.config, h100), error_range(run.config, b200)
    assert (of_hopper.family, of_blackwell.family) == ("bf16 MoE", "B200")
    assert of_hopper.errors.tenth < 1.0 < of_hopper.errors.nine_tenths
    ampere = error_range(run.config, Machine.of(load_hardware("a100_sxm")))
    # There are only dense runs of A100s: MoE models on H100 say more.
    assert (ampere.family, ampere.is_own) == ("bf16 MoE", False)
    assert of_hopper.is_own


def test_units_of_speed_are_the_same_run(tmp_path):
    seconds = row(QWEN, measured={"step_time_s": 24.7138})
    tokens = 1024 * 4096 / 24.7138 / 16
    flop = {"tflops_per_gpu": tokens * 20.0 / 1000, "gflop_per_token": 20.0}
    same = [seconds, row(QWEN, name="b", measured={"tokens_per_s_per_gpu": tokens})]
    speeds = [
        run.tokens_per_s_per_gpu
        for run in runs_of(tmp_path, *same, row(QWEN, name="c", measured=flop))
    ]
    assert speeds == pytest.approx([tokens] * 3)


def test_a_row_need_not_be_one_of_this_trainers(tmp_path):
    # Dense and recomputed in part; fully sharded, which is not estimated.
    [run] = runs_of(tmp_path, row(LLAMA))
    assert not any(run.load.is_moe)
    assert run.unused == ("fully_sharded",)
    assert (run.grid.recompute, run.grid.recomputed_layers) == (("full",), 5)
    whole = replace(run, grid=replace(run.grid, recomputed_layers=None))
    assert compare(run).tokens_per_s_per_gpu > 1.15 * compare(whole).tokens_per_s_per_gpu
    assert compare(run).memory_gib > compare(whole).memory_gib


def test_facts_beyond_the_settings_count(tmp_path):
    plain = {key: value for key, value in row(DEEPSEEK).items() if key != "beyond"}

    def found(**beyond):
        return compare(runs_of(tmp_path, {**plain, "beyond": beyond})[0])

    base = found()
    assert found(multi_token_prediction_layers=1).step.total > base.step.total
    assert found(gradient_bytes=2).memory_gib < base.memory_gib
    assert found(moment_bytes=2).memory_gib < base.memory_gib
    assert found(master_bytes=0).memory_gib < base.memory_gib
    assert found(master_bytes=0).step.total < base.step.total
    assert found(permute_fusion=False).step.total > base.step.total
    assert found(sliding_window=256).step.total < base.step.total
    halfway = found(sliding_window=256, sliding_window_every=2).step.total
    assert found(sliding_window=256).step.total < halfway < base.step.total
    assert found(most_nodes_per_token=4).step.total < base.step.total
    assert found(expert_bias=True).step.total > base.step.total
    assert found(activation_clamp=True).step.total > base.step.total
    assert found(rotation_fusion=False).step.total > base.step.total
    # Of two tensor-parallel ranks, half of what is exchanged is exposed.
    exposed = found(tensor_overlap=True).step.seconds["tensor parallel"]
    assert exposed == pytest.approx(base.step.seconds["tensor parallel"] / 2)
    assert found(wings=2).run.unused == ("wings",)


def test_dualpipe_waits_less_than_two_chunks_a_rank(tmp_path):
    [run] = runs_of(tmp_path, row("DeepSeek-V3 FP8, own run, 2,048 H800, PP16 EP64 DualPipe"))
    interleaved = replace(run, grid=replace(run.grid, is_dualpipe=False))
    assert run.hardware.nvlink_gb_s == 400
    idle = [compare(one).step.seconds["pipeline bubble"] for one in (run, interleaved)]
    # Two thirds of the half that interleaving leaves, and messages on top of both.
    assert 0.6 < idle[0] / idle[1] < 0.75


def test_custom_stages_are_those_of_the_row(tmp_path):
    [run] = runs_of(tmp_path, row(DEEPSEEK))
    sizes = [len(run.stages[stage % 8][stage // 8]) for stage in range(32)]
    assert sizes == [1, *[2] * 30, 0]
    with config_error(r"layers_per_stage \(62 layers in 32 stages\) must be 61"):
        runs_of(tmp_path, row(DEEPSEEK, layers_per_stage=[1, *[2] * 30, 1]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gpus": 12}, r"gpus \(12\) must be a multiple of the expert and pipeline ranks \(16\)"),
        ({"gpus": 0}, r"row 1 \(Qwen3-30B.*: gpus \(0\): Input should be greater than"),
        ({"routing": "loud"}, r"routing \(loud\)"),
        ({"beyond": {"gradient_bytes": 3}}, r"gradient_bytes \(3\)"),
        ({"measured": {"step_time_s": 1, "tokens_per_s_per_gpu": 2}}, "give one of"),
        ({"measured": {"speed": 1}}, r"measured.speed \(1\)"),
        ({"settings": {"model.wings": 2}}, r"wings"),
        ({"settings": {"model.num_layers": 0}}, r"model.num_layers \(0\) must be at least 1"),
        ({"settings": {"training.global_batch_size": 1000}}, r"must be a multiple of micro-batch"),
        ({"settings": {"wings": 2}}, r"must have the form section.key"),
        ({"settings": {"moe.layer_freq": [1, 0]}}, r"moe.layer_freq \(2 entries\) must have"),
        (
            {"settings": {"parallel.pipeline_model_parallel_layout": "Ex|L"}},
            r"parallel.pipeline_model_parallel_layout .* holds 'x'",
        ),
        (
            {
                "settings": {
                    "parallel.tensor_model_parallel_size": 16,
                    "model.num_attention_heads": 40,
                }
            },
            r"model.num_attention_heads \(40\) must be a multiple of the tensor ranks \(16\)",
        ),
        ({"hardware": "abacus"}, r"hardware \(abacus\) must be a known name"),
        ({"hardware_overrides": {"nvlink_gb_s": -1}}, r"nvlink_gb_s"),
        ({"hardware_overrides": {"reached": {"luck": 1}}}, r"reached.luck \(1.0\) must be one of"),
    ],
)
def test_a_wrong_row_is_refused_by_name(tmp_path, changes, says):
    with config_error(says):
        compare(runs_of(tmp_path, row(QWEN, **changes))[0])


def test_names_are_unique_and_a_file_is_a_list(tmp_path):
    with config_error("must be unique, 2 rows have it"):
        runs_of(tmp_path, row(QWEN), row(QWEN))
    path = tmp_path / "rows.yaml"
    path.write_text("name: one\n")
    with config_error("must hold a list of rows"):
        read_runs(path)
    with config_error("cannot be read"):
        read_runs(tmp_path / "none.json")


def test_memory_of_deepseek_v3_in_bf16(tmp_path):
    """arXiv 2603.07685, table 3: 256 cards, PP4 VPP4 EP64, no recomputation."""
    [run] = runs_of(tmp_path, row(DEEPSEEK))
    load = replace(run.load, numbers=NumberFormats())
    grid = replace(run.grid, world=256, tp=1, pp=4, vpp=4, recompute=())
    stages = stages_of((*(4,) * 13, 3, 3, 3), 4)
    ranks = [_memory_of(load, grid, stages, rank) for rank in range(4)]
    middle = ranks[1]
    # The table does not say which rank it describes; a middle one holds no vocabulary.
    assert (middle.weights + middle.gradients) / 1e9 == pytest.approx(36.4, rel=0.03)
    assert middle.optimizer / 1e9 == pytest.approx(32.1, rel=0.03)
    # 131.0 GB of activations: between the first rank's and the second's.
    assert middle.activations / 1e9 < 131.0 < ranks[0].activations / 1e9


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        # 61.351 GB (docs/training/moe-optimization.md), 62.166 GiB with overlap
        # (skills/nemo-mbridge-perf-moe-comm-overlap), both of Megatron-Bridge.
        ("Qwen3-30B bf16, 16, EP16 alltoall, no overlap", 61.351e9 / GIB),
        ("Qwen3-30B bf16, 16, overlap", 62.166),
        ("Moonlight-16B bf16, 8, TP2 EP8 alltoall, batch 4", 34.103),
    ],
)
def test_peaks_of_memory(name, gib, tmp_path):
    # The bound of the project for measured peaks.
    assert compare(runs_of(tmp_path, row(name))[0]).memory_gib == pytest.approx(gib, rel=0.10)
