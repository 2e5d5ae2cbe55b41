"""Compares a built rank with the layout's arithmetic and with the plan."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moepp_megatron.config import Config, Layout, stage_layers
from moepp_megatron.runtime.optional import have_transformer_engine
from moepp_megatron.workbench.planning.built_rank.build import BuiltRank
from moepp_megatron.workbench.planning.grid import Grid
from moepp_megatron.workbench.planning.latent_attention import LatentAttention
from moepp_megatron.workbench.planning.memory import memory_of
from moepp_megatron.workbench.planning.shapes import expected_shape
from moepp_megatron.workbench.planning.workload import Workload

_ATTENTION = ("tp", "cp", "dp", "pp")
_EXPERTS = ("etp", "ep", "edp", "pp")


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: The compared quantity.
        built: Value of the built rank.
        expected: Calculated value.
        holds: Whether both agree.
    """

    name: str
    built: str
    expected: str
    holds: bool


def check_rank(config: Config, layout: Layout, built: BuiltRank) -> list[Check]:
    """All comparisons of one rank: groups, layers, shapes, parameters, memory."""
    place = layout.coordinates(built.rank)
    checks = [_group(layout, built, name) for name in built.groups]
    expected = [list(chunk) for chunk in stage_layers(config)[place.pp]]
    checks.append(Check("layers", str(built.layers), str(expected), built.layers == expected))
    checks.append(_shapes(config, layout, built))
    return checks + _sizes(config, layout, built, place.pp)


def _built_workload(config: Config) -> Workload:
    """The workload as this machine builds it; plans count Transformer Engine's modules."""
    load = Workload.from_config(config)
    if isinstance(load.attention, LatentAttention) and not have_transformer_engine():
        return replace(load, attention=replace(load.attention, splits_compressions=True))
    return load


def _group(layout: Layout, built: BuiltRank, name: str) -> Check:
    varying = tuple(name.split())
    whole = _EXPERTS if varying[0] in ("etp", "ep", "edp") else _ATTENTION
    expected = layout.members(built.rank, varying, whole)
    found = built.groups[name]
    # The order too: it decides which shard is whose.
    return Check(f"group {name}", _ranks(found), _ranks(expected), found == expected)


def _ranks(ranks: list[int]) -> str:
    if len(ranks) <= 4:
        return f"{len(ranks)}: {', '.join(map(str, ranks))}"
    return f"{len(ranks)}: {ranks[0]}, {ranks[1]} .. {ranks[-1]}"


def _shapes(config: Config, layout: Layout, built: BuiltRank) -> Check:
    load, grid = _built_workload(config), Grid.from_layout(config, layout)
    wrong, unknown = [], []
    for parameter in built.parameters:
        expected = expected_shape(parameter.name, load, grid)
        if expected is None:
            unknown.append(parameter.name)
        elif expected != parameter.shape:
            wrong.append(f"{parameter.name} {list(parameter.shape)} not {list(expected)}")
    known = len(built.parameters) - len(unknown)
    text = f"{known - len(wrong)} of {known}"
    if unknown:
        # Counted below all the same.
        text += f", {len(unknown)} without a rule ({unknown[0]})"
    if wrong:
        text += f"; {wrong[0]}"
    return Check("shapes as expected", text, f"{known} of {known}", not wrong)


def _sizes(config: Config, layout: Layout, built: BuiltRank, pp_rank: int) -> list[Check]:
    load = _built_workload(config)
    stages = stage_layers(config)
    said = memory_of(load, Grid.from_layout(config, layout), stages, pp_rank)
    numbers = load.numbers
    dense = sum(one.numel for one in built.parameters if not one.is_expert)
    experts = sum(one.numel for one in built.parameters if one.is_expert)
    weights = sum(one.numel * one.size for one in built.parameters)
    dtypes = sorted({one.dtype for one in built.parameters})
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[numbers.dtype]
    state = numbers.moments_bytes + numbers.master_bytes
    optimizer = built.mean_shard * state
    exact = (
        ("parameters outside FFN experts", dense, said.dense),
        ("parameters of FFN experts", experts, said.experts),
        ("bytes of weights", weights, said.weights),
        ("bytes of gradients", built.gradient_bytes, said.gradients),
    )
    checks = [
        Check(name, f"{found:,}", f"{expected:,}", found == expected)
        for name, found, expected in exact
    ]
    checks.append(Check("dtype", ", ".join(dtypes), dtype, dtypes == [dtype]))
    # The plan cuts dense and expert state to whole bytes.
    checks.append(
        Check(
            "bytes of optimizer state, mean of its shards",
            f"{optimizer:,.0f}",
            f"{said.optimizer:,}",
            abs(optimizer - said.optimizer) < 2,
        )
    )
    return checks
