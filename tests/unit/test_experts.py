"""The layout of experts: order, names, phi, and costs against counts by hand."""

import ast
from dataclasses import fields
from importlib.resources import files

import pytest

from moepp_megatron.config import parse_config
from moepp_megatron.config.schema import MoESection
from moepp_megatron.config.schema.section import meaning_of
from moepp_megatron.experts import (
    CONSTANT,
    COPY,
    FFN,
    FFN_ONLY,
    KIND_NAMES,
    KINDS,
    ZERO,
    ExpertCounts,
    ExpertLayout,
)
from moepp_megatron.layer_settings import DECLARED, EXPORTED, LayerSettings
from moepp_megatron.model.megatron_config import moepp_config
from moepp_megatron.moe.config import MoEPPConfig
from tests.parallel.training_runs import EP2, settings

COUNTS = ExpertCounts(8, num_constant_experts=4, num_copy_experts=2, num_zero_experts=3)


def test_a_field_for_each_kind_in_the_order_of_the_columns():
    assert [field.name for field in fields(ExpertCounts)] == [kind.setting for kind in KINDS]
    assert len(set(KIND_NAMES)) == len(KINDS)
    # One comparison finds FFN experts, one zero experts.
    assert (KINDS[0], KINDS[-1]) == (FFN, ZERO)


def test_columns_and_names():
    columns = list(range(COUNTS.num_experts))
    assert COUNTS.by_kind == (8, 4, 2, 3)
    assert columns[COUNTS.columns(FFN)] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert columns[COUNTS.columns(CONSTANT)] == [8, 9, 10, 11]
    assert columns[COUNTS.columns(COPY)] == [12, 13]
    assert columns[COUNTS.columns(ZERO)] == [14, 15, 16]
    assert COUNTS.kinds == ["FFN"] * 8 + ["constant"] * 4 + ["copy"] * 2 + ["zero"] * 3
    assert COUNTS.names[7:9] == ["FFN 7", "constant 0"]
    assert COUNTS.summary == "8 FFN + 4 constant + 2 copy + 3 zero"
    assert (
        ExpertCounts(2, num_constant_experts=0, num_copy_experts=1, num_zero_experts=0).summary
        == "2 FFN + 1 copy"
    )


@pytest.mark.parametrize("tau", [0.1, 0.75, 3.0])
def test_tau_for_is_phi_turned_around(tau):
    assert COUNTS.phi(tau) == pytest.approx(tau * 8 / (tau * 8 + 9), rel=1e-15)
    # Two roundings of numbers of order one.
    assert COUNTS.tau_for(COUNTS.phi(tau)) == pytest.approx(tau, rel=1e-14)


def test_without_others_every_selection_is_an_ffn_experts():
    assert ExpertCounts(8, **FFN_ONLY).phi(0.75) == 1.0
    # The paper's.
    assert ExpertCounts(8).phi(0.75) == pytest.approx(0.6)
    assert ExpertLayout(8, **FFN_ONLY, gating_residual=False).is_vanilla
    assert not ExpertLayout(8, **FFN_ONLY).is_vanilla
    assert not ExpertLayout(gating_residual=False).is_vanilla


def test_costs_by_hand():
    layout, D, H = (ExpertLayout(8), 10, 32)
    assert FFN.parameters(D, H) == 3 * D * H
    assert FFN.flops(D, H) == 6 * D * H
    assert layout.router_parameters(D, is_first=True) == 12 * D
    assert layout.router_parameters(D, is_first=False) == 12 * D + 12 * 12
    assert dict(layout.local_weights(D)) == {"constants": (2, D), "mixing_weight": (2, 2, D)}
    assert layout.local_parameters(D, is_first=False) == 2 * 3 * D
    # s x, U x of two rows an expert, A V.
    assert layout.local_flops(D) == 2 * D + 2 * (2 * 2 * D) + 2 * (2 * D)


def test_costs_of_variants():
    D = 10
    two_layers = ExpertLayout(
        8,
        num_constant_experts=2,
        num_copy_experts=1,
        num_zero_experts=1,
        two_layer_gate=True,
        gating_residual=False,
    )
    assert two_layers.gate_shapes(D) == [(96, D), (12, 96)]
    assert two_layers.router_parameters(D, is_first=False) == 96 * D + 12 * 96
    shared = ExpertLayout(8, constants_shared=True)
    assert shared.local_parameters(D, is_first=True) == 2 * 3 * D
    assert shared.local_parameters(D, is_first=False) == 2 * 2 * D
    assert ExpertLayout(8, **FFN_ONLY).local_flops(D) == 0
    # Nothing is multiplied, but copies of the input are scaled.
    assert ExpertLayout(8, num_constant_experts=0).local_flops(D) == 2 * D
    assert ExpertLayout(8, num_constant_experts=0).local_parameters(D, is_first=True) == 0


def test_settings_are_declared_once():
    names = {field.name for field in fields(LayerSettings)}
    assert names < set(MoESection.model_fields)
    assert not names & set(MoESection.__annotations__)
    # Its default is taken away: who builds a layer says how many experts megatron-core has.
    assert names & set(MoEPPConfig.__annotations__) == {"num_ffn_experts"}
    for field in fields(LayerSettings):
        described = MoESection.model_fields[field.name]
        assert described.default == field.default, field.name
        assert meaning_of(described), field.name


def test_the_exported_model_has_the_same_defaults():
    # Read, not imported: the file needs transformers.
    source = (files("moepp_megatron.interop.hf_files") / "configuration_moepp.py").read_text()
    (kind,) = (
        node for node in ast.parse(source).body if getattr(node, "name", "") == "MoEPPConfig"
    )
    exported = {
        field.target.id: ast.literal_eval(field.value)
        for field in kind.body
        if isinstance(field, ast.AnnAssign)
    }
    assert {name: exported[name] for name in EXPORTED} == {
        name: DECLARED[name].default for name in EXPORTED
    }


def test_the_layer_gets_what_the_user_set():
    changes = {
        "num_ffn_experts": 4,
        "num_constant_experts": 3,
        "router_topk": 3,
        "tau": 0.5,
        "gate_normalization": "nonzero",
        "constant_temperature": 2.0,
        "dispatcher": "alltoall_dedup",
    }
    layer = moepp_config(parse_config(settings(moe=changes, parallel=EP2)))
    for name in changes.keys() - {"dispatcher"}:
        assert getattr(layer, name) == changes[name], name
    assert layer.deduplicate_dispatch
    assert layer == MoEPPConfig(
        **{n: v for n, v in changes.items() if n != "dispatcher"}, deduplicate_dispatch=True
    )
