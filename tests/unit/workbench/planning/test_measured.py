"""Rows of measured runs: their format, the model beside them, inputs fitted to them."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from moepp_megatron.config import ConfigError
from moepp_megatron.config.hardware import load_hardware
from moepp_megatron.config.stages import stages_of
from moepp_megatron.workbench.planning.coster import GIB
from moepp_megatron.workbench.planning.efficiency import Efficiencies
from moepp_megatron.workbench.planning.machine import machine_of
from moepp_megatron.workbench.planning.measured.compare import (
    Comparison,
    compare,
    family_errors,
    pair_errors,
)
from moepp_megatron.workbench.planning.measured.fit import fit
from moepp_megatron.workbench.planning.measured.published import (
    HELD_OUT,
    SET_NUMBERS,
    error_range,
    held_out,
    set_numbers,
)
from moepp_megatron.workbench.planning.measured.rows import Run, read_runs
from moepp_megatron.workbench.planning.memory import memory_of
from moepp_megatron.workbench.planning.workload import Numbers
from moepp_megatron.workbench.report.measured import families_table, rows_table

DOCS = Path(__file__).parents[4] / "docs" / "planning.md"


@pytest.fixture(scope="module")
def chosen_by() -> list[Comparison]:
    return set_numbers()


@pytest.fixture(scope="module")
def shown_on() -> list[Comparison]:
    return held_out()


def rows() -> list[dict[str, Any]]:
    return [*json.loads(SET_NUMBERS.read_text()), *json.loads(HELD_OUT.read_text())]


def row(which: str, **changes: Any) -> dict[str, Any]:
    [found] = [one for one in rows() if one["name"] == which]
    settings = {**found["settings"], **changes.pop("settings", {})}
    return {**found, "settings": settings, **changes}


DEEPSEEK = "DeepSeek-V3 bf16, 1,024, TP2 PP8 VPP4 EP64 HybridEP, no overlap"
QWEN = "Qwen3-30B bf16, 16, EP16 HybridEP, no overlap, balance forced"
LLAMA = "Llama-3 8B FP8 tensorwise, 8, FSDP, 5 of 32 layers recomputed"


def runs_of(tmp_path: Path, *entries: object) -> list[Run]:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(entries))
    return read_runs(path)


def test_runs_that_set_no_number_are_met_as_the_docs_say(shown_on: list[Comparison]) -> None:
    # The bounds that the project set itself; what is reached stands in docs/planning.md.
    bounds = {"bf16 MoE": 0.12, "FP8 MoE": 0.15, "B200": 0.20, "dense FP8": 0.10}
    found = family_errors(shown_on)
    assert found.keys() >= bounds.keys()
    for family, bound in bounds.items():
        assert found[family].median <= bound, (family, found[family])


def test_ratios_that_set_numbers_are_met(chosen_by: list[Comparison]) -> None:
    ratios = {pair.name: pair.error for pair in pair_errors(chosen_by)}
    assert len(ratios) >= 4
    assert max(map(abs, ratios.values())) < 0.08, ratios


def test_the_tables_in_the_docs_are_what_the_model_says(
    chosen_by: list[Comparison], shown_on: list[Comparison]
) -> None:
    text = DOCS.read_text()
    assert rows_table(chosen_by) in text
    assert rows_table(shown_on) in text
    assert families_table(chosen_by, shown_on) in text


def test_errors_told_elsewhere_are_those_of_the_rows(shown_on: list[Comparison]) -> None:
    found = family_errors(shown_on, ("in",)) | {
        # Of these there are only runs with other software.
        "dense bf16": family_errors(shown_on, ("near",))["dense bf16"]
    }
    median = {family: errors.median for family, errors in found.items()}
    told = {
        "README.md": "{bf16 MoE:.0%} for MoE models in bf16 and {FP8 MoE:.0%} in FP8 on H100, "
        "{B200:.0%} on B200, {dense FP8:.0%} for dense models in FP8 and {dense bf16:.0%} in bf16",
        "docs/proven.md": "{bf16 MoE:.1%} for bf16 MoE and {FP8 MoE:.1%} for FP8 MoE on H100, "
        "{B200:.1%} on B200, {dense FP8:.1%} for dense FP8, {dense bf16:.1%} for dense bf16",
        "docs/planning.md": "{bf16 MoE:.0%} (4 runs of MoE models in bf16 on H100), "
        "{FP8 MoE:.0%} (6 in FP8), {B200:.0%} (9 on B200) and {dense FP8:.0%} (12 dense",
    }
    for page, sentence in told.items():
        assert sentence.format_map(median) in _text_of(page), page
    # Of all the rows, as `moepp plan` says it.
    every = family_errors(shown_on, ("in", "near"))
    everywhere = f"with them it is {every['bf16 MoE'].median:.0%} for "
    for page in ("README.md", "docs/proven.md"):
        assert everywhere in _text_of(page), page


def _text_of(page: str) -> str:
    return " ".join((DOCS.parents[1] / page).read_text().split())


OVERLAPPED = "Qwen3-30B bf16, 16, overlap"
TO_ALL = "Qwen3-30B bf16, 16, EP16 alltoall, "
MIXTRAL = "Mixtral-8x22B bf16, 128"
BLOCKWISE = "Qwen3-30B FP8 blockwise, 16, EP16 HybridEP, "
# The ratios of docs/planning.md: the faster and the slower row.
RATIOS = {
    "Qwen3-30B on HybridEP: routing forced to balance over learned": (
        QWEN,
        "Qwen3-30B bf16, 16, EP16 HybridEP, no overlap, learned routing",
    ),
    "Qwen3-30B, all-to-all: with over without overlap": (TO_ALL + "overlap", TO_ALL + "no overlap"),
    "Qwen3-30B on HybridEP: with over without overlap (20.99 s, 24.71 s)": (OVERLAPPED, QWEN),
    "Qwen3-30B, no overlap: HybridEP over all-to-all with permutation not fused": (
        QWEN,
        TO_ALL + "no overlap",
    ),
    "Llama-3 8B on B200: tensorwise over MXFP8": (
        "Llama-3 8B FP8 tensorwise, 8",
        "Llama-3 8B MXFP8, 8",
    ),
    "Mixtral: blockwise FP8 over bf16": ("Mixtral-8x22B FP8 blockwise, 128", MIXTRAL),
    "Qwen3-235B: bf16 (arXiv 2603.07685) over FP8 (26.02), other software": (
        "Qwen3-235B bf16, 256, overlap",
        "Qwen3-235B FP8 tensorwise, 256 (26.02)",
    ),
    "Mixtral: balance forced over learned": (MIXTRAL, MIXTRAL + ", learned routing"),
    "Qwen3-30B in blockwise FP8: with graphs over without": (
        BLOCKWISE + "graphs",
        BLOCKWISE + "no graphs",
    ),
    "DeepSeek-V3 on B200: two layouts of two releases": (
        "DeepSeek-V3 MXFP8, 256, PP8 VPP2 EP32, overlap (26.04.01)",
        "DeepSeek-V3 MXFP8, 256, PP16 EP8 (26.02)",
    ),
}


def test_the_ratios_in_the_docs_are_those_of_the_rows(
    chosen_by: list[Comparison], shown_on: list[Comparison]
) -> None:
    by_name = {one.run.row.name: one for one in (*chosen_by, *shown_on)}
    table = DOCS.read_text().split("| runs | measured | model |")[1].split("\n\n")[0]
    printed = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert {label for label, *_ in printed} == RATIOS.keys()
    for label, measured, model, _ in printed:
        fast, slow = (by_name[name] for name in RATIOS[label])
        speeds = [one.run.tokens_per_s_per_gpu or 0.0 for one in (fast, slow)]
        if (times := re.search(r"\(([0-9.]+) s, ([0-9.]+) s\)", label)) is not None:
            # Of one report, where the row of the overlapped run is another's.
            speeds = [1 / float(seconds) for seconds in times.groups()]
        assert measured == f"{speeds[0] / speeds[1]:.2f}", label
        assert model == f"{fast.tokens_per_s_per_gpu / slow.tokens_per_s_per_gpu:.2f}", label


def test_the_range_of_a_plan_is_that_of_its_family() -> None:
    run = read_runs(HELD_OUT)[0]
    h100, b200 = (machine_of(load_hardware(name)) for name in ("h100_sxm", "b200"))
    of_hopper, of_blackwell = error_range(run.config, h100), error_range(run.config, b200)
    assert of_hopper is not None
    assert of_blackwell is not None
    assert (of_hopper.family, of_blackwell.family) == ("bf16 MoE", "B200")
    assert of_hopper.errors.tenth < 1.0 < of_hopper.errors.nine_tenths
    ampere = error_range(run.config, machine_of(load_hardware("a100_sxm")))
    # There are only dense runs of A100s: MoE models on H100 say more.
    assert ampere is not None
    assert (ampere.family, ampere.is_own) == ("bf16 MoE", False)
    assert of_hopper.is_own


def test_units_of_speed_are_the_same_run(tmp_path: Path) -> None:
    seconds = row(QWEN, measured={"step_time_s": 24.7138})
    tokens = 1024 * 4096 / 24.7138 / 16
    flop = {"tflops_per_gpu": tokens * 20.0 / 1000, "gflop_per_token": 20.0}
    same = [seconds, row(QWEN, name="b", measured={"tokens_per_s_per_gpu": tokens})]
    speeds = [
        run.tokens_per_s_per_gpu
        for run in runs_of(tmp_path, *same, row(QWEN, name="c", measured=flop))
    ]
    assert speeds == pytest.approx([tokens] * 3)


def test_a_row_need_not_be_one_of_this_trainers(tmp_path: Path) -> None:
    # Dense and recomputed in part; fully sharded, which is not estimated.
    [run] = runs_of(tmp_path, row(LLAMA))
    assert not any(run.load.is_moe)
    assert run.unused == ("fully_sharded",)
    assert [run.grid.recompute_of(place) for place in (4, 5)] == [("full",), ()]
    whole = replace(run, grid=replace(run.grid, recomputed_layers=None))
    assert compare(run).tokens_per_s_per_gpu > 1.15 * compare(whole).tokens_per_s_per_gpu
    assert compare(run).memory_gib > compare(whole).memory_gib


def test_facts_beyond_the_settings_count(tmp_path: Path) -> None:
    plain = {key: value for key, value in row(DEEPSEEK).items() if key != "beyond"}

    def found(**beyond: Any) -> Comparison:
        return compare(runs_of(tmp_path, {**plain, "beyond": beyond})[0])

    base = found()
    assert found(multi_token_prediction_layers=1).step.total > base.step.total
    assert found(gradient_bytes=2).memory_gib < base.memory_gib
    assert found(moment_bytes=2).memory_gib < base.memory_gib
    assert found(permute_fusion=False).step.total > base.step.total
    assert found(sliding_window=256).step.total < base.step.total
    halfway = found(sliding_window=256, sliding_window_every=2).step.total
    assert found(sliding_window=256).step.total < halfway < base.step.total
    assert found(most_nodes_per_token=4).step.total < base.step.total
    assert found(wings=2).run.unused == ("wings",)


def test_a_router_that_pads_spares_copies_of_rows(tmp_path: Path) -> None:
    plain = row("Qwen3-235B FP8 tensorwise, 256 (26.02)")
    padded = {**plain, "name": "padded", "beyond": {**plain["beyond"], "router_padding": True}}
    copied, spared = map(compare, runs_of(tmp_path, plain, padded))
    assert spared.step.total < copied.step.total


def test_dualpipe_waits_less_than_two_chunks_a_rank(tmp_path: Path) -> None:
    [run] = runs_of(tmp_path, row("DeepSeek-V3 FP8, own run, 2,048 H800, PP16 EP64 DualPipe"))
    interleaved = replace(run, grid=replace(run.grid, is_dualpipe=False))
    assert run.hardware.nvlink_gb_s == 400
    idle = [compare(one).step.seconds["pipeline bubble"] for one in (run, interleaved)]
    # Two thirds of the half that interleaving leaves, and messages on top of both.
    assert 0.6 < idle[0] / idle[1] < 0.75


def test_custom_stages_are_those_of_the_row(tmp_path: Path) -> None:
    [run] = runs_of(tmp_path, row(DEEPSEEK))
    sizes = [len(run.stages[stage % 8][stage // 8]) for stage in range(32)]
    assert sizes == [1, *[2] * 30, 0]
    with pytest.raises(
        ConfigError, match=r"layers_per_stage \(62 layers in 32 stages\) must be 61"
    ):
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
def test_a_wrong_row_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        compare(runs_of(tmp_path, row(QWEN, **changes))[0])


def test_names_are_unique_and_a_file_is_a_list(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be unique, 2 rows have it"):
        runs_of(tmp_path, row(QWEN), row(QWEN))
    path = tmp_path / "rows.yaml"
    path.write_text("name: one\n")
    with pytest.raises(ConfigError, match="must hold a list of rows"):
        read_runs(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_runs(tmp_path / "none.json")


def test_the_examples_of_the_docs_are_rows(tmp_path: Path) -> None:
    # The block of YAML below "Your own runs".
    text = DOCS.read_text().split("## Your own runs")[1].split("```yaml\n")[1].split("```")[0]
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    runs = read_runs(path)
    assert len(runs) == len(yaml.safe_load(text)) >= 4
    for run in runs:
        assert compare(run).tokens_per_s_per_gpu > 0


def test_a_fit_finds_the_machine_that_made_the_rows() -> None:
    """Speeds made by another machine, of every second published H100 run."""
    known = [one for one in read_runs(HELD_OUT) if one.hardware.name == "h100_sxm"]
    known = [one for one in known if one.row.scope == "in"][::2]
    truth = {"fp8_matmul": 0.5, "launch_s": 50e-6, "network": 0.7}
    made = []
    for run in known:
        other = machine_of(run.hardware, Efficiencies.of(truth, "a test"))
        speed = compare(run, other).tokens_per_s_per_gpu
        measured = run.row.measured.model_copy(
            update={"step_time_s": None, "tflops_per_gpu": None, "tokens_per_s_per_gpu": speed}
        )
        made.append(replace(run, row=run.row.model_copy(update={"measured": measured})))
    found = fit(made)

    def middle(errors: tuple[float, ...]) -> float:
        return statistics.median(map(abs, errors))

    # Inputs are held near their start, so that the truth is met in part.
    assert middle(found.before) > 0.05
    assert middle(found.after) < middle(found.before) / 3
    assert middle(found.held_out) < middle(found.before) / 2
    assert found.hardware.reached["fp8_matmul"] == pytest.approx(0.5, rel=0.06)
    assert found.changed["network"][1] < 0.85
    # What is written is a hardware file that a plan takes.
    again = machine_of(type(found.hardware).model_validate(yaml.safe_load(found.yaml("rows.json"))))
    assert again.reached.fp8_matmul == pytest.approx(found.changed["fp8_matmul"][1], rel=1e-3)


def test_a_fit_needs_enough_rows_of_one_card(tmp_path: Path) -> None:
    few = runs_of(tmp_path, row(QWEN))
    with pytest.raises(ConfigError, match="at least 3 measured rows"):
        fit(few)
    others = [row(QWEN, name=str(number), hardware="h200") for number in range(2)]
    with pytest.raises(ConfigError, match="one kind of GPU, not of h100_sxm, h200"):
        fit(runs_of(tmp_path, row(QWEN), *others))


def test_published_layouts_fit_the_card(chosen_by: list[Comparison]) -> None:
    for one in chosen_by:
        machine = machine_of(one.run.hardware)
        held = one.memory_gib + machine.reached.reserved_gib
        assert held * GIB < machine.memory_bytes, one.run.row.name


def test_memory_of_deepseek_v3_in_bf16(tmp_path: Path) -> None:
    """arXiv 2603.07685, table 3: 256 cards, PP4 VPP4 EP64, no recomputation."""
    [run] = runs_of(tmp_path, row(DEEPSEEK))
    load = replace(run.load, numbers=Numbers())
    grid = replace(run.grid, world=256, tp=1, pp=4, vpp=4, recompute=())
    stages = stages_of((*(4,) * 13, 3, 3, 3), 4)
    ranks = [memory_of(load, grid, stages, rank) for rank in range(4)]
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
def test_peaks_of_memory(name: str, gib: float, tmp_path: Path) -> None:
    # The bound of the project for measured peaks.
    assert compare(runs_of(tmp_path, row(name))[0]).memory_gib == pytest.approx(gib, rel=0.10)
