"""A new value of a setting is refused by what does not compute it yet, not taken for another."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moepp_megatron.config import load_config
from moepp_megatron.experts import LOCAL_KINDS, ZERO
from moepp_megatron.model.megatron_config import transformer_config
from moepp_megatron.moe import zero_computation
from moepp_megatron.moe.budget import Budget, BudgetController
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.reference import ReferenceMoEPP, balance_loss, select_experts
from moepp_megatron.moe.selection import select
from moepp_megatron.tools.planning.grid import Grid
from moepp_megatron.tools.planning.traffic import exchanged_bytes
from moepp_megatron.tools.planning.workload import Workload
from tests.unit.moe.builders import build_layer
from tests.unit.moe.test_kernels import compiled  # noqa: F401

REFUSED = (AssertionError, KeyError)


def with_value(name: str, value: Any = "unlisted") -> MoEPPConfig:
    config = MoEPPConfig(4, num_constant_experts=1)
    object.__setattr__(config, name, value)
    return config


USES: dict[str, tuple[str, Callable[[MoEPPConfig, Any], object]]] = {
    "selection": (
        "gate_normalization",
        lambda config, _: select(torch.zeros(3, config.num_experts), None, config, None),
    ),
    "reference": (
        "gate_normalization",
        lambda config, _: select_experts(torch.zeros(3, config.num_experts), config),
    ),
    "kernel": (
        "gate_normalization",
        lambda config, kernels: kernels.select(
            torch.zeros(3, config.num_experts), None, config, None
        ),
    ),
    "balance loss": (
        "balance_scope",
        lambda config, _: build_layer(config).router.routing(torch.zeros(3, 2, config.num_experts)),
    ),
    "kind of balance loss": (
        "balance_loss",
        lambda config, _: build_layer(config).router.routing(torch.zeros(3, 2, config.num_experts)),
    ),
    "balance loss of the reference": (
        "balance_loss",
        lambda config, _: balance_loss(torch.ones(3, 4), torch.ones(3, 4), config),
    ),
    "initial constants": ("constant_init", lambda config, _: build_layer(config)),
}


@pytest.mark.parametrize("use", USES)
def test_layer(compiled: Any, use: str) -> None:  # noqa: F811
    name, compute = USES[use]
    with pytest.raises(REFUSED, match="unlisted"):
        compute(with_value(name), compiled)


@pytest.mark.parametrize("kind", LOCAL_KINDS, ids=lambda kind: kind.name)
def test_kinds_of_experts(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MoEPPConfig(4, **{each.setting: 1 for each in LOCAL_KINDS})
    others = tuple(each for each in LOCAL_KINDS if each is not kind)
    monkeypatch.setattr(zero_computation, "_COMPUTED", others)
    with pytest.raises(AssertionError, match=f"{kind.name} experts are undefined"):
        build_layer(config)


def test_the_reference_has_no_expert_of_an_undefined_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MoEPPConfig(2)
    layer, token = ReferenceMoEPP(config, 4, 4), torch.ones(1, 4)
    place = config.columns(ZERO).start
    assert not layer.expert(place, token).any()
    # As if an expert of another kind came between copy and zero experts.
    own = MoEPPConfig.columns
    further = slice(place + 1, place + 2)
    columns = lambda config, kind: further if kind is ZERO else own(config, kind)  # noqa: E731
    monkeypatch.setattr(MoEPPConfig, "columns", columns)
    with pytest.raises(AssertionError, match="expert 5 is of an undefined kind"):
        layer.expert(place, token)


def test_controllers() -> None:
    controller: Any = "unlisted"
    budget = BudgetController(Budget(0.5, controller, gain=1.0), MoEPPConfig(4), 1)
    with pytest.raises(AssertionError, match="unlisted"):
        budget.observe(torch.ones(1, 8), 1)


def test_dispatchers() -> None:
    config = load_config("configs/quickstart.yaml", ["parallel.expert_model_parallel_size=2"])
    load = Workload.from_config(config).with_dispatcher("unlisted")  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="unlisted"):
        exchanged_bytes(load, Grid.from_config(config, 2))


def test_vanilla_layer() -> None:
    config = load_config(
        "configs/quickstart.yaml",
        [f"moe.{kind.setting}=0" for kind in LOCAL_KINDS] + ["moe.gating_residual=false"],
    )
    for name in ("gate_normalization", "balance_scope"):
        moe = config.moe.model_copy(update={name: "unlisted"})
        with pytest.raises(KeyError, match="unlisted"):
            transformer_config(config.model_copy(update={"moe": moe}))
