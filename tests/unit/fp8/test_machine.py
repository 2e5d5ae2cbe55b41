"""The machines that can run each kind of FP8, and the refusal of the others."""

from dataclasses import replace

import pytest

from moepp_megatron.config import UnfitError, load_config
from moepp_megatron.runtime.fit import FP8Machine, check_fit
from moepp_megatron.tools.doctor import packages
from moepp_megatron.tools.doctor.finding import Severity
from tests import ROOT

H100 = FP8Machine(transformer_engine=(2, 20, 0), capability=(9, 0), cuda=(13, 0))
A100, L40, NEITHER = (8, 0), (8, 9), FP8Machine(None, None, None)


def config_of(recipe, *overrides):
    fp8 = ["precision.dtype=bf16", "precision.fp8=hybrid", f"precision.fp8_recipe={recipe}"]
    return load_config(ROOT / "configs/models/moepp_0.6b_8_4.yaml", [*fp8, *overrides])


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_an_h100_runs_every_recipe(recipe):
    assert H100.obstacle(config_of(recipe, "precision.fp8_param=true")) is None


@pytest.mark.parametrize(
    ("recipe", "overrides", "machine", "rule", "remedy"),
    [
        (
            "delayed",
            [],
            NEITHER,
            "precision.fp8 (hybrid) must have Transformer Engine and a GPU",
            "set precision.fp8 to null, or install",
        ),
        (
            "delayed",
            [],
            replace(H100, capability=A100),
            "precision.fp8_recipe (delayed) must have a GPU of compute capability 8.9, not 8.0",
            "use another GPU (H100: 9.0)",
        ),
        ("tensorwise", [], replace(H100, capability=A100), "compute capability 8.9", "H100"),
        ("blockwise", [], replace(H100, capability=L40), "capability 9.0, not 8.9", "H100"),
        ("mxfp8", [], H100, "compute capability 10.0 and below 12.0, not 9.0", "B200: 10.0"),
        ("mxfp8", [], replace(H100, capability=(12, 0)), "below 12.0, not 12.0", "B200: 10.0"),
        ("blockwise", [], replace(H100, cuda=(12, 8)), "12.9 or newer, not 12.8", "tensorwise"),
        (
            "tensorwise",
            [],
            replace(H100, transformer_engine=(2, 1)),
            "precision.fp8_recipe (tensorwise) must have Transformer Engine 2.2 or newer, not 2.1",
            "install a newer one",
        ),
        ("blockwise", [], replace(H100, transformer_engine=(2, 2)), "Engine 2.3", "newer"),
        ("delayed", [], replace(H100, transformer_engine=(1, 10)), "Engine 1.11", "newer"),
        (
            "delayed",
            ["precision.fp8_param=true"],
            replace(H100, transformer_engine=(2, 2)),
            "precision.fp8_param (true) must have Transformer Engine 2.3",
            "change the setting",
        ),
        (
            "tensorwise",
            ["training.recompute_granularity=selective", "training.recompute_modules=[moe_act]"],
            replace(H100, transformer_engine=(2, 5)),
            "training.recompute_modules ([moe_act]) with precision.fp8 must have Transformer "
            "Engine 2.6",
            "change the setting",
        ),
    ],
)
def test_what_is_missing_is_named(recipe, overrides, machine, rule, remedy):
    obstacle = machine.obstacle(config_of(recipe, *overrides))
    found, _, told = obstacle.partition("; ")
    assert rule in found
    assert remedy in told
    assert "\n" not in obstacle


def test_an_older_card_runs_what_it_can():
    ada = replace(H100, capability=L40, cuda=(12, 4))
    assert ada.obstacle(config_of("delayed")) is None
    assert ada.obstacle(config_of("tensorwise")) is None


def test_a_b200_runs_mxfp8():
    assert replace(H100, capability=(10, 0)).obstacle(config_of("mxfp8")) is None


def test_the_doctor_shows_the_same(monkeypatch):
    monkeypatch.setattr(FP8Machine, "this", classmethod(lambda cls: replace(H100, capability=L40)))
    finding = packages._check_config(config_of("blockwise"))
    assert finding.severity is Severity.ERROR
    assert "9.0, not 8.9" in finding.rule
    assert "H100" in finding.remedy


@pytest.mark.parametrize(
    ("machine", "lack"),
    [
        (NEITHER, "Transformer Engine and a GPU"),
        (replace(H100, transformer_engine=(2, 2)), "Transformer Engine 2.3 or newer, not 2.2"),
        (H100, None),
    ],
)
def test_bf16_moments_need_fused_adam(monkeypatch, machine, lack):
    monkeypatch.setattr(FP8Machine, "this", classmethod(lambda cls: machine))
    overrides = ["precision.dtype=bf16", "optimizer.exp_avg_sq_dtype=bf16"]
    config = load_config(ROOT / "configs/models/moepp_0.6b_8_4.yaml", overrides)
    if lack is None:
        check_fit(config)
        return
    with pytest.raises(UnfitError) as caught:
        check_fit(config)
    assert f"optimizer.exp_avg_sq_dtype (bf16) must have {lack}" in str(caught.value)
    assert "use fp32, or install" in str(caught.value)


@pytest.mark.parametrize(
    ("machine", "overrides", "is_fit"),
    [
        (H100, ["precision.dtype=bf16"], True),
        (NEITHER, [], True),
        (H100, ["precision.dtype=fp32"], False),
        (H100, ["precision.dtype=bf16", "moe.ffn_hidden_size=36"], False),
        (replace(H100, capability=A100), ["precision.dtype=bf16"], False),
    ],
)
def test_static_rows_need_grouped_products(monkeypatch, machine, overrides, is_fit):
    monkeypatch.setattr(FP8Machine, "this", classmethod(lambda cls: machine))
    static = ["moe.static_rows=1.3", "precision.cross_entropy=unfused", *overrides]
    config = load_config(ROOT / "configs/models/moepp_0.6b_8_4.yaml", static)
    if is_fit:
        check_fit(config)
        return
    with pytest.raises(UnfitError, match=r"static_rows \(1.3\) must have bf16, widths .* Hopper"):
        check_fit(config)


def test_this_machine_refuses_before_it_starts(monkeypatch):
    monkeypatch.setattr(FP8Machine, "this", classmethod(lambda cls: NEITHER))
    with pytest.raises(UnfitError, match=r"precision.fp8 \(hybrid\) must have") as caught:
        check_fit(config_of("delayed"))
    assert caught.value.exit_code == 3
