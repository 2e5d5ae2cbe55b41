"""Score functions: their formulas, and that whoever needs scores computes a new one or refuses."""

import contextlib
from typing import Literal

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

from moepp_megatron.config import ConfigError, load_config
from moepp_megatron.experts import FFN_ONLY
from moepp_megatron.interop.hf_config import RELEASED, refuse_uncomputed
from moepp_megatron.interop.vanilla import VANILLA
from moepp_megatron.interop.zeda import ZEDA
from moepp_megatron.layer_settings import DECLARED
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.margins import count_margins
from moepp_megatron.moe.reference import select_experts
from moepp_megatron.moe.router_health import RouterHealth
from moepp_megatron.moe.scores import SCORES, _Score, ffn_scores, score_of
from moepp_megatron.moe.selection import select
from tests.refusals import config_error
from tests.unit.moe.builders import DEFINED_SCORES, assert_close, build_layer
from tests.unit.moe.test_kernels import compiled  # noqa: F401


def test_one_list():
    from moepp_megatron.moe.kernels.scores import SCORES as IN_KERNELS

    declared = DECLARED["score_function"].choices
    assert declared == tuple(SCORES) == IN_KERNELS == tuple(DEFINED_SCORES)


@pytest.mark.parametrize("name", SCORES)
def test_formulas(name):
    score, define = SCORES[name], DEFINED_SCORES[name]
    z = torch.randn(50, 8, dtype=torch.float64) * 6
    assert_close(score.scores(z), define(z), name, 1e-14)
    # Logarithms up to a constant for each token.
    logs, expected = score.logs(z), define(z).log()
    assert_close(logs - logs[:, :1], expected - expected[:, :1], name, 1e-13)
    scores = score.scores(z)
    assert_close(score.shares(z, scores), define(z) / define(z).sum(-1, keepdim=True), name, 1e-14)
    leaf = z.requires_grad_()
    assert torch.autograd.gradcheck(score.scores, leaf)
    assert torch.autograd.gradcheck(score.logs, leaf)


@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("name", ["sigmoid", "sqrtsoftplus"])
def test_gates_are_megatron_cores(name, topk):
    config = MoEPPConfig(
        8,
        **FFN_ONLY,
        router_topk=topk,
        score_function=name,
        gate_normalization="selected" if topk > 1 else "none",
        gate_scale=2.5,
    )
    logits, bias = torch.randn(40, 8) * 3, torch.randn(8) * 0.3
    theirs, their_map = topk_routing_with_score_function(
        logits, topk, scaling_factor=2.5, score_function=name, expert_bias=bias
    )
    ours = select(logits, bias, config, None)
    assert torch.equal(ours.routing_map, their_map)
    # Two fp32 ways to the same number.
    assert_close(ours.gates, theirs, "gates", 2e-6)


def fake(logits):
    return (logits / 2).exp()


@pytest.fixture
def declared(monkeypatch):
    """A score function `fake` that configurations accept and nobody computes."""
    kind = Literal["softmax", "sigmoid", "sqrtsoftplus", "fake"]
    row = DECLARED["score_function"]._replace(type=kind)
    monkeypatch.setitem(DECLARED, "score_function", row)  # type: ignore[arg-type]


def configured(**changes):
    config = load_config("configs/quickstart.yaml")
    return config.model_copy(update={"moe": config.moe.model_copy(update=changes)})


@pytest.mark.usefixtures("declared")
@pytest.mark.parametrize("normalization", ["none", "selected", "nonzero"])
def test_a_new_score_is_computed_by_whoever_asks(monkeypatch, normalization):
    monkeypatch.setitem(SCORES, "fake", _Score(fake, lambda logits: logits / 2))
    config = MoEPPConfig(4, score_function="fake", gate_normalization=normalization)
    logits = torch.randn(30, config.num_experts)
    gates, selected, shares = select_experts(logits, config)
    scores = fake(logits)
    assert_close(shares, scores / scores.sum(-1, keepdim=True), "shares")
    chosen = select(logits, None, config, 30)
    assert torch.equal(chosen.routing_map, selected)
    assert_close(chosen.gates, gates, "gates")
    assert chosen.score_sums is not None
    assert_close(chosen.score_sums, shares, "shares")
    if normalization == "none":
        assert_close(chosen.gates, fake(logits) * chosen.routing_map, "gates")
        assert torch.equal(ffn_scores(logits, config)[:, :4], fake(logits[:, :4]))
        bias = torch.zeros(config.num_experts)
        bias[0] = 0.5
        ranked = fake(logits) + bias
        in_way = ranked[:, 4:].topk(2).values.flip(-1)
        margins = in_way - ranked[:, :4].topk(2).values
        counts = count_margins(logits, bias, config)
        assert int(counts.sum()) == margins.numel()
        assert int(counts[: len(counts) // 2].sum()) == int((margins <= 0).sum())
        health = RouterHealth(config)
        health.add_routing(logits, logits, selected, None)
        assert_close(health._sums["entropy"], -torch.xlogy(shares, shares).sum(), "entropy")


@pytest.mark.usefixtures("declared")
def test_a_score_that_is_not_listed_is_refused(compiled):  # noqa: F811
    config = MoEPPConfig(4, score_function="fake")
    logits, bias = torch.randn(5, config.num_experts), torch.zeros(config.num_experts)
    router = build_layer(config, calculate_per_token_loss=False).router
    health = RouterHealth(config)
    selected = torch.zeros_like(logits, dtype=torch.bool)
    users = {
        "selection": lambda: select(logits, None, config, None),
        "reference": lambda: select_experts(logits, config),
        "router": lambda: router.routing(logits.view(5, 1, -1)),
        "FFN experts": lambda: ffn_scores(logits, config),
        "margins": lambda: count_margins(logits, bias, config),
        "health": lambda: health.add_routing(logits, logits, selected, None),
        "kernel": lambda: compiled.select(logits, None, config, None),
    }
    refusing = []
    for name, use in users.items():
        with contextlib.suppress(ValueError):
            use()
            continue
        refusing.append(name)
    assert refusing == list(users)
    with pytest.raises(ValueError, match=r"score_function \(fake\) is unknown; use softmax or"):
        score_of(config)
    with pytest.raises(ValueError, match=r"score_function \(fake\) must be .*; set fused to False"):
        compiled.select(logits, None, config, None)


@pytest.mark.parametrize(
    "export",
    [refuse_uncomputed, RELEASED.fields, ZEDA.fields, VANILLA.fields],
)
def test_no_export_has_a_score_that_it_does_not_list(export):
    with config_error(r"moe.score_function \('fake'\) must be 'softmax"):
        export(configured(score_function="fake"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gate_normalization": "sum"},
            r"moe.gate_normalization \('sum'\) must be 'none' or 'selected",
        ),
        ({"balance_scope": "document"}, r"moe.balance_scope \('document'\) must be 'micro"),
    ],
)
def test_an_export_refuses_values_that_its_file_does_not_list(changes, message):
    refuse_uncomputed(configured())
    with config_error(message):
        refuse_uncomputed(configured(**changes))


def test_an_export_refuses_settings_and_kinds_that_its_file_does_not_know(monkeypatch):
    text = "from nowhere import nothing\nCOMPUTES = {'kinds': 'FFN zero', 'others': 'tau'}\n"
    monkeypatch.setattr("pathlib.Path.read_text", lambda path, encoding: text)
    with pytest.raises(ConfigError) as caught:
        refuse_uncomputed(configured(balance_coeff=0.5))
    lines = str(caught.value).splitlines()
    assert {line.partition(" for")[0] for line in lines} == {
        "moe.num_constant_experts (2) must be 0",
        "moe.num_copy_experts (1) must be 0",
        "moe.balance_coeff (0.5) must be 0.01",
    }
