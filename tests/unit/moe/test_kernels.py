"""Triton kernels against the PyTorch code that defines them: compiled where there is a GPU."""

import dataclasses
import os
import sys
from collections import Counter
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moepp_megatron.experts import CONSTANT, COPY, LOCAL_KINDS
from moepp_megatron.moe import kernels, selection
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.copies import Copies, rows_of_tokens
from moepp_megatron.moe.scores import SCORES
from moepp_megatron.moe.token_tags import SOURCE, TagCounts, count_by_tags
from moepp_megatron.moe.zero_computation import Ingredients
from tests.commands import captured, succeeded
from tests.unit.moe.builders import HIDDEN, assert_close, build_layer, of_kinds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# A dozen fp32 operations on numbers around 1, exponentials and divisions in another way than
# PyTorch's, sums over at most 300 terms: unit roundoff 6e-8 times a few tens.
FP32 = 5e-6
# One conversion to bf16 of what was summed in fp32. The interpreter cuts off, up to 2^-7; a GPU
# rounds, half of it.
BF16 = 2**-7


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """The kernels' modules. Triton asks for its interpreter when it sees a kernel's definition."""
    triton = pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            # Triton's own functions are kernels as well (see tests/conftest.py).
            if isinstance(triton.language.sum, triton.JITFunction):
                pytest.skip("no GPU here, and Triton was imported without its interpreter")
            patch.setenv("TRITON_INTERPRET", "1")
            _forget_compiled_kernels(triton)
        from moepp_megatron.moe.kernels import combine, cross_entropy, router, rows, tags
        from tests.unit.moe import product_kernel

        yield SimpleNamespace(
            select=router.select,
            combine=combine.combine,
            rows_of_tokens=rows.rows_of_tokens,
            count_by_tags=tags.count_by_tags,
            cross_entropy=cross_entropy.cross_entropy,
            multiply=product_kernel.multiply,
        )


def _forget_compiled_kernels(triton):
    """Have all kernels' modules imported anew if another test's import has defined any for a GPU.

    All of them, for those that launch kernels keep the modules that define them.
    """
    package = "moepp_megatron.moe.kernels."
    names = [name for name in sys.modules if name.startswith(package)]
    kernels = [value for name in names for value in vars(sys.modules[name]).values()]
    if any(isinstance(kernel, triton.JITFunction) for kernel in kernels):
        for name in names:
            del sys.modules[name]
            delattr(sys.modules[package[:-1]], name.removeprefix(package))


# Experts of each kind: FFN, zero, copy, constant.
E5, E12, E20, FFN3 = (2, 1, 1, 1), (8, 1, 1, 2), (16, 1, 1, 2), (3, 0, 0, 0)
# (experts, K, score function, normalisation, scale, bias, tokens, sequences)
SELECTIONS = [
    (E12, 2, "softmax", "none", 1.0, False, 66, 1),
    (E12, 2, "softmax", "selected", 2.5, True, 66, 3),
    (E12, 3, "softmax", "nonzero", 1.0, False, 33, None),
    (E12, 1, "sigmoid", "none", 2.5, True, 31, 1),
    (E20, 4, "sigmoid", "selected", 1.0, False, 40, 2),
    (E20, 2, "softmax", "nonzero", 1.5, True, 17, 1),
    (E5, 3, "sigmoid", "nonzero", 1.0, True, 130, 2),
    (E5, 4, "softmax", "none", 1.0, False, 1, 1),
    (FFN3, 3, "softmax", "selected", 1.0, False, 7, 7),
    (E12, 2, "sqrtsoftplus", "none", 2.5, True, 66, 1),
    (E20, 4, "sqrtsoftplus", "selected", 1.0, False, 40, 2),
    (E5, 3, "sqrtsoftplus", "nonzero", 1.0, True, 31, None),
]


def assert_same_selection(actual, expected, tolerance=FP32):
    assert torch.equal(actual.routing_map, expected.routing_map)
    assert_close(actual.gates, expected.gates, "gates", tolerance)
    assert (actual.counts is None) == (expected.counts is None)
    if expected.counts is not None:
        assert torch.equal(actual.counts, expected.counts)
        assert_close(actual.score_sums, expected.score_sums, "score sums", tolerance)


@pytest.mark.parametrize("pads", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("case", SELECTIONS)
def test_selection(compiled, case, pads):
    experts, topk, function, normalization, scale, has_bias, tokens, sequences = case
    config = of_kinds(
        experts, topk, score_function=function, gate_normalization=normalization, gate_scale=scale
    )
    num_experts = config.num_experts
    logits = torch.randn(tokens, num_experts, device=DEVICE) * 2
    bias = torch.randn(num_experts, device=DEVICE) * 0.1 if has_bias else None
    padded = torch.rand(tokens, device=DEVICE) < 0.4 if pads else None
    to_gates = torch.randn(tokens, num_experts, device=DEVICE)
    to_sums = torch.randn(sequences or 1, num_experts, device=DEVICE)

    def run(select):
        leaf = logits.clone().requires_grad_()
        chosen = select(leaf, bias, config, sequences, padded=padded)
        loss = (chosen.gates * to_gates).sum()
        if chosen.score_sums is not None:
            loss = loss + (chosen.score_sums * to_sums).sum()
        loss.backward()
        return chosen, leaf.grad

    expected, expected_grad = run(selection.select)
    actual, actual_grad = run(compiled.select)
    assert_same_selection(actual, expected)
    assert_close(actual_grad, expected_grad, "gradient of logits")
    if pads:
        assert (actual.routing_map.sum(dim=1) == torch.where(padded, 0, topk)).all()
        assert not actual_grad[padded].any()


# Groups, groups kept, K, score function, bias.
GROUPS = [
    (4, 1, 2, "softmax", False),
    (4, 2, 4, "softmax", True),
    (8, 3, 4, "sigmoid", False),
    (2, 1, 3, "sigmoid", True),
    (4, 2, 4, "sqrtsoftplus", False),
]


@pytest.mark.parametrize("case", GROUPS)
def test_selection_within_groups(compiled, case):
    groups, kept, topk, function, has_bias = case
    config = of_kinds(
        E20,
        topk,
        score_function=function,
        num_groups=groups,
        group_topk=kept,
        gate_normalization="nonzero",
    )
    logits = torch.randn(70, 20, device=DEVICE) * 2
    bias = torch.randn(20, device=DEVICE) * 0.1 if has_bias else None
    expected = selection.select(logits, bias, config, 2)
    assert_same_selection(compiled.select(logits, bias, config, 2), expected)
    free = dataclasses.replace(config, num_groups=1, group_topk=1)
    assert not torch.equal(
        selection.select(logits, bias, free, 2).routing_map, expected.routing_map
    )
    # All scores of FFN experts underflow, or are equal.
    logits[:, 16:] += 300.0
    logits[::2, :16] = 1.0
    expected = selection.select(logits, bias, config, 2)
    assert_same_selection(compiled.select(logits, bias, config, 2), expected)
    broken = torch.randn(5, 20, device=DEVICE)
    broken[3, 7] = float("nan")
    assert (compiled.select(broken, bias, config, 1).routing_map.sum(-1) == topk).all()


def test_selection_of_several_tiles_by_a_program(compiled, monkeypatch):
    # As with many tokens of many experts: tiles of 8 tokens, 2 a program, and a tile of none.
    from moepp_megatron.moe.kernels import router

    monkeypatch.setattr(router, "_TILE", 128)
    monkeypatch.setattr(router, "_PROGRAMS", 6)
    config = of_kinds(E12, 2, score_function="sigmoid")
    logits = torch.randn(3 * 33, 12, device=DEVICE)
    expected = selection.select(logits, None, config, 3)
    assert_same_selection(compiled.select(logits, None, config, 3), expected)


@pytest.mark.parametrize("used", ["gates", "sums"])
def test_selection_with_one_gradient(compiled, used):
    config = of_kinds(E12, 2, score_function="sigmoid", gate_normalization="selected")
    logits = torch.randn(20, 12, device=DEVICE)
    weights = torch.randn(20, 12, device=DEVICE)

    def gradient(select):
        leaf = logits.clone().requires_grad_()
        chosen = select(leaf, None, config, 1)
        loss = chosen.gates * weights if used == "gates" else chosen.score_sums * weights[:1]
        loss.sum().backward()
        return leaf.grad

    assert_close(gradient(compiled.select), gradient(selection.select), "gradient of logits")


@pytest.mark.parametrize("function", SCORES)
@pytest.mark.parametrize("largest_bias", [None, 2, -1])
def test_ties(compiled, function, largest_bias):
    # Few different logits, -0 among them, so most tokens have ties; the bias makes more, and ranks
    # that are negative, all of them in the last case. Its steps are larger than what scores differ
    # by between two libraries.
    values = torch.tensor([-1.0, -0.0, 0.0, 1.0, -300.0, 300.0, 400.0], device=DEVICE)
    logits = values[torch.randint(len(values), (96, 20), device=DEVICE)]
    bias = None
    if largest_bias is not None:
        bias = torch.randint(-4, largest_bias, (20,), device=DEVICE) * 0.75
    for topk in (1, 2, 4):
        config = of_kinds(E20, topk, score_function=function)
        expected = selection.select(logits, bias, config, 1)
        assert_same_selection(compiled.select(logits, bias, config, 1), expected)
    assert (logits.sort(dim=1).values.diff(dim=1) == 0).any(dim=1).all()


@pytest.mark.parametrize("function", ["sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("normalization", ["selected", "nonzero"])
def test_gates_of_scores_that_underflow(compiled, function, normalization):
    # Scores of -300 are 0 in fp32; their shares are not, and there is no NaN.
    config = of_kinds(E5, 2, score_function=function, gate_normalization=normalization)
    logits = torch.full((3, 5), -300.0, device=DEVICE)
    logits[1] = torch.tensor([-300.0, -300.0, -300.0, -300.0, 1.0])
    leaf = logits.clone().requires_grad_()
    chosen = compiled.select(leaf, None, config, None)
    assert_same_selection(chosen, selection.select(logits, None, config, None))
    chosen.gates.sum().backward()
    assert leaf.grad.isfinite().all()


def test_nan_is_selected_and_seen(compiled):
    # Whatever a broken token's logits are, K experts are selected and other tokens are as before.
    logits = torch.randn(5, 12, device=DEVICE)
    broken = logits.clone()
    broken[3, 7] = float("nan")
    for function, normalization in (
        ("sigmoid", "none"),
        ("softmax", "selected"),
        ("sqrtsoftplus", "nonzero"),
    ):
        config = of_kinds(E12, 2, score_function=function, gate_normalization=normalization)
        actual = compiled.select(broken, None, config, None)
        expected = selection.select(logits, None, config, None)
        assert (actual.routing_map.sum(dim=1) == 2).all()
        assert actual.gates[3][actual.routing_map[3]].isnan().any()
        assert not actual.gates[3][~actual.routing_map[3]].isnan().any()
        assert function == "softmax" or actual.routing_map[3, 7]
        others = torch.tensor([0, 1, 2, 4], device=DEVICE)
        assert torch.equal(actual.routing_map[others], expected.routing_map[others])
        assert torch.equal(actual.gates[others].isnan(), expected.gates[others].isnan())


def test_no_tokens(compiled):
    config = of_kinds(E12, 2)
    chosen = compiled.select(torch.zeros(0, 12, device=DEVICE), None, config, 1)
    assert chosen.gates.shape == (0, 12)
    assert chosen.counts.tolist() == [[0.0] * 12]
    assert chosen.score_sums.tolist() == [[0.0] * 12]


@pytest.mark.parametrize(("tokens", "columns"), [(23, 5), (1, 3), (128, 1), (300, 20), (0, 3)])
def test_rows_of_tokens(compiled, tokens, columns):
    # Columns of a wider map, as FFN columns are of the map of all experts.
    routing_map = (torch.rand(tokens, columns + 3, device=DEVICE) < 0.3)[:, :columns]
    slots = min(columns, 12)
    routing_map &= routing_map.cumsum(dim=1) <= slots
    table = rows_of_tokens(routing_map, slots)
    assert torch.equal(compiled.rows_of_tokens(routing_map, slots), table)
    copies = Copies(routing_map, int(routing_map.sum()))
    for token, rows in enumerate(table.tolist()):
        found = (copies.row == token).nonzero().flatten().tolist()
        assert rows == found + [-1] * (slots - len(found))


def test_rows_of_tokens_beyond_one_load_of_counts(compiled, monkeypatch):
    # More than 32 programs, of two tiles of 64 tokens, the last of them with one.
    from moepp_megatron.moe.kernels import rows

    monkeypatch.setattr(rows, "_TILE", 128)
    monkeypatch.setattr(rows, "_PROGRAMS", 36)
    routing_map = torch.rand(4500, 2, device=DEVICE) < 0.5
    table = compiled.rows_of_tokens(routing_map, 2)
    assert torch.equal(table, rows_of_tokens(routing_map, 2))


# Cells, groups, sources, experts, FFN experts, tokens.
TAGGED = [
    (20, 3, 12, 8, 301),
    (70, 0, 70, 64, 130),
    (0, 33, 40, 32, 17),
    (1, 1, 1, 1, 1),
    (3, 3, 12, 8, 0),
]


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("case", TAGGED)
def test_counts_by_tags(compiled, case, padded):
    groups, sources, num_experts, num_ffn, tokens = case
    padding = torch.rand(tokens, device=DEVICE) < 0.3 if padded else None

    chosen = torch.rand(tokens, num_experts, device=DEVICE) < 0.4
    if padding is not None:
        chosen &= ~padding.unsqueeze(1)

    def some(number, first_bit):
        return torch.randint(max(1, number), (tokens, 1), device=DEVICE) << first_bit

    tags = some(groups, 0) + some(sources, SOURCE)
    expected, actual = (TagCounts.zeros(groups, sources, num_experts, DEVICE) for _ in range(2))
    # The second micro-batch adds to what is there.
    for _ in range(2):
        count_by_tags(expected, chosen, tags, num_ffn, padding)
        compiled.count_by_tags(actual, chosen, tags, num_ffn, padding)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
    num_counted = tokens if padding is None else int((~padding).sum())
    assert actual.groups[:, -1].sum() == (2 * num_counted if groups else 0)
    assert actual.sources.sum() == (2 * chosen.sum() if sources else 0)


@dataclasses.dataclass
class Parts:
    """The operands of a combine; floating-point tensors are leaves."""

    config: MoEPPConfig
    routing_map: Tensor
    rows: Tensor
    zero: Ingredients | None
    addend: Tensor | None

    @property
    def ffn_map(self):
        return self.routing_map[:, : self.config.num_ffn_experts]

    def leaves(self):
        named = {"rows": self.rows, "addend": self.addend}
        if self.zero is not None:
            named |= self.zero._asdict()
            del named["routing_map"]
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def make_parts(routing_map, hidden, config, has_addend=False, dtype=torch.float32):
    def leaf(*shape, dtype=dtype):
        return torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_()

    tokens, constants = len(routing_map), config.num_constant_experts
    rows = leaf(int(routing_map[:, : config.num_ffn_experts].sum()), hidden)
    zero = None
    if constants or config.num_copy_experts:
        gates = leaf(tokens, config.num_experts, dtype=torch.float32)
        gates.detach().mul_(routing_map)
        mixing = leaf(tokens, 2 * constants, dtype=torch.float32) if constants else None
        vectors = leaf(constants, hidden) if constants else None
        zero = Ingredients(leaf(tokens, hidden), gates, routing_map, mixing, vectors)
    return Parts(config, routing_map, rows, zero, leaf(tokens, hidden) if has_addend else None)


def plain_combine(parts):
    """The definition, in fp32."""
    config = parts.config
    token = parts.ffn_map.T.nonzero()[:, 1]
    output = torch.zeros(len(parts.routing_map), parts.rows.shape[1], device=DEVICE)
    output = output.index_add(0, token, parts.rows.float())
    if parts.zero is not None:
        x, gates, _, mixing, vectors = parts.zero
        s = gates[:, config.columns(COPY)].sum(dim=1)
        if mixing is not None:
            pairs = mixing.view(len(x), -1, 2) * config.expert_input_scale
            keep, replace = torch.softmax(pairs, dim=-1).unbind(dim=-1)
            s = s + (gates[:, config.columns(CONSTANT)] * keep).sum(dim=1)
            output = output + (gates[:, config.columns(CONSTANT)] * replace) @ vectors.float()
        output = output + (s * config.expert_input_scale).unsqueeze(1) * x.float()
    return output if parts.addend is None else output + parts.addend.float()


def random_map(tokens, config):
    """0 to K selections a token."""
    shape = (tokens, config.num_experts)
    picks = torch.rand(shape, device=DEVICE).topk(config.router_topk, dim=1).indices
    routing_map = torch.zeros(shape, dtype=torch.bool, device=DEVICE).scatter_(1, picks, True)
    return routing_map & (torch.rand(shape, device=DEVICE) < 0.7)


# (tokens, hidden, experts of each kind, K, scale of the experts' input, addend)
COMBINATIONS = [
    (37, 20, E12, 2, 1.0, False),
    (1, 300, E5, 1, 2.0, True),
    (19, 257, (5, 1, 2, 6), 3, 1.0, False),
    (40, 48, (8, 1, 3, 0), 4, 2.0, True),
    (35, 96, (16, 0, 0, 3), 2, 1.5, True),
    (16, 64, (3, 2, 0, 0), 2, 1.0, True),
    (9, 100, (3, 2, 0, 0), 1, 1.0, False),
    (70, 24, (3, 1, 1, 30), 4, 1.5, True),
    (100, 40, (3, 1, 2, 62), 6, 1.0, False),
    # Tiles of 64 columns.
    (20, 70, (3, 1, 2, 130), 6, 1.0, True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", COMBINATIONS)
def test_combine(compiled, case, dtype):
    tokens, hidden, experts, topk, scale, has_addend = case
    config = of_kinds(experts, topk, expert_input_scale=scale)
    parts = make_parts(random_map(tokens, config), hidden, config, has_addend, dtype)
    check_combine(compiled.combine, parts)


@pytest.mark.parametrize("expert", [None, 2, 8])
def test_combine_where_all_select_the_same(compiled, expert):
    # No FFN token; all tokens to one FFN expert; all to one zero-computation expert.
    config = of_kinds(E12, 2)
    routing_map = torch.zeros(21, 12, dtype=torch.bool, device=DEVICE)
    if expert is not None:
        routing_map[:, expert] = True
    check_combine(compiled.combine, make_parts(routing_map, 40, config))


def test_combine_with_long_sums(compiled, monkeypatch):
    # As with many tokens: 128 of them in one program of the backward pass, then 22 in another.
    from moepp_megatron.moe.kernels import combine

    monkeypatch.setattr(combine, "_PROGRAMS", 1)
    config = of_kinds(E12, 2)
    check_combine(compiled.combine, make_parts(random_map(150, config), 20, config))


def check_combine(combine, parts):
    tolerance = FP32 if parts.rows.dtype == torch.float32 else BF16
    table = rows_of_tokens(parts.ffn_map, parts.config.router_topk)
    actual = combine(parts.rows, table, parts.zero, parts.addend, parts.config)
    expected = plain_combine(parts)
    assert actual.dtype == parts.rows.dtype
    assert_close(actual, expected, "output", tolerance)
    weights = torch.randn(expected.shape, device=DEVICE).to(actual.dtype)
    leaves = parts.leaves()
    ours = torch.autograd.grad((actual * weights).sum(), list(leaves.values()))
    theirs = torch.autograd.grad(
        (expected * weights.float()).sum(), list(leaves.values()), materialize_grads=True
    )
    for name, mine, reference in zip(leaves, ours, theirs, strict=True):
        if name == "gates":
            # The router drops gradients of gates that are 0 because nothing was selected.
            mine, reference = mine * parts.routing_map, reference * parts.routing_map
        assert mine.shape == reference.shape
        if mine.numel():
            assert_close(mine, reference, f"gradient of {name}", tolerance)


@pytest.mark.parametrize("narrow", [(), (1,), (0, 1)], ids=["none", "second", "both"])
def test_products_of_the_combine_lose_nothing(compiled, narrow):
    # Against fp64: 24 bits of each factor, 32 additions in fp32. TF32 is off by 2^-11, two parts
    # of 8 bits by 2^-16.
    factors = [torch.randn(16, 32, device=DEVICE), torch.randn(32, 16, device=DEVICE)]
    for place in narrow:
        factors[place] = factors[place].bfloat16()
    actual = torch.empty(16, 16, device=DEVICE)
    compiled.multiply[(1,)](*factors, actual, WIDEN=DEVICE.type == "cpu")
    a, b = (factor.double() for factor in factors)
    bound = 2e-6 * (a.abs() @ b.abs())
    assert ((actual.double() - a @ b).abs() <= bound).all()


def test_combine_of_no_tokens(compiled):
    config = of_kinds(E12, 2)
    parts = make_parts(torch.zeros(0, 12, dtype=torch.bool, device=DEVICE), 24, config, True)
    table = rows_of_tokens(parts.ffn_map, 2)
    output = compiled.combine(parts.rows, table, parts.zero, parts.addend, config)
    output.sum().backward()
    assert output.shape == (0, 24)
    assert parts.zero.constants.grad.abs().max() == 0
    assert parts.zero.gates.grad.shape == (0, 12)


# (MoEPPConfig, dispatcher, megatron-core's settings)
LAYERS = [
    ({}, "alltoall", {}),
    ({"gate_normalization": "nonzero", "expert_input_scale": 2.0}, "alltoall_dedup", {}),
    ({"balance_scope": "sequence", "score_function": "sigmoid"}, "allgather", {}),
    ({"expert_input_scale": 2.0}, "allgather", {"moe_shared_expert_intermediate_size": 8}),
    (
        {"num_constant_experts": 0, "num_copy_experts": 0},
        "allgather",
        {"moe_shared_expert_intermediate_size": 8},
    ),
    (
        {"gate_normalization": "selected", "capacity_factor": 0.6, "logits_norm_std": 1.5},
        "alltoall",
        {"moe_shared_expert_intermediate_size": 8, "moe_z_loss_coeff": 1e-2},
    ),
    ({"num_constant_experts": 0, "num_copy_experts": 0, "balance_scope": "global"}, "alltoall", {}),
    ({"selection_bias": True, "gate_scale": 2.0, "two_layer_gate": True}, "alltoall", {}),
    ({"constant_temperature": 0.3, "expert_input_scale": 2.0}, "alltoall", {}),
    ({kind.setting: 1 for kind in LOCAL_KINDS}, "alltoall", {}),
]


@pytest.mark.parametrize(("changes", "dispatcher", "others"), LAYERS)
def test_layer_with_and_without_kernels(compiled, changes, dispatcher, others):
    config = MoEPPConfig(4, balance_coeff=0.5, **changes)
    plain = build_layer(dataclasses.replace(config, fused=False), dispatcher=dispatcher, **others)
    fused = build_layer(dataclasses.replace(config, fused=True), dispatcher=dispatcher, **others)
    fused.load_state_dict(plain.state_dict())
    for layer in (plain, fused):
        layer.to(DEVICE)
        if config.selection_bias:
            layer.router.expert_bias.copy_(torch.linspace(-0.2, 0.2, config.num_experts))
    assert fused.router.fused
    assert fused.fuses == config.have_kernels
    assert not plain.fuses
    assert fused.fuses_rows == (fused.fuses and dispatcher != "allgather")
    hidden, previous, *weights = (
        torch.randn(9, 3, width, device=DEVICE)
        for width in (HIDDEN, config.num_experts, HIDDEN, config.num_experts)
    )

    def run(layer):
        inputs = hidden.clone().requires_grad_(), previous.clone().requires_grad_()
        output, logits = layer(*inputs)
        ((output * weights[0]).sum() + (logits * weights[1]).sum()).backward()
        tensors = {"output": output, "logits": logits}
        tensors |= {"hidden": inputs[0].grad, "previous": inputs[1].grad}
        tensors |= {name: p.grad for name, p in layer.named_parameters()}
        return tensors, layer.statistics.as_vector()

    expected, expected_counts = run(plain)
    actual, actual_counts = run(fused)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # The same sums as in builders.assert_close, which allows 1e-5.
        assert_close(actual[name], value, name)
    assert_close(actual_counts, expected_counts, "statistics")
    with torch.no_grad():
        assert_close(fused(hidden, previous)[0], plain(hidden, previous)[0], "without gradients")


@pytest.mark.parametrize("kind", LOCAL_KINDS, ids=lambda kind: kind.name)
def test_the_kernel_is_not_used_for_a_kind_that_declares_none(compiled, kind, monkeypatch):
    counts = {each.setting: int(each.has_kernel) for each in LOCAL_KINDS} | {kind.setting: 1}
    monkeypatch.setattr(kind, "has_kernel", False)
    assert not build_layer(MoEPPConfig(4, fused=True, **counts)).fuses
    assert build_layer(MoEPPConfig(4, fused=True, **(counts | {kind.setting: 0}))).fuses


@pytest.mark.parametrize("shared", [None, 8], ids=["alone", "shared"])
def test_local_experts_before_the_rows(compiled, shared, monkeypatch):
    # One rank waits for nothing, so one kernel does all; ranks that wait do local experts before
    # (tests/parallel/test_dispatchers.py has the order), and get the same.
    from moepp_megatron.moe.kernels import combine

    config = MoEPPConfig(4, fused=True)
    layer = build_layer(config, moe_shared_expert_intermediate_size=shared).to(DEVICE)
    assert layer.fuses_rows
    assert not layer.local_first
    launches = []
    original = combine.combine
    monkeypatch.setattr(combine, "combine", lambda *a: launches.append(len(a[0])) or original(*a))
    hidden, previous, weight = (
        torch.randn(9, 3, width, device=DEVICE) for width in (HIDDEN, config.num_experts, HIDDEN)
    )

    def run(local_first):
        layer.local_first = local_first
        layer.zero_grad()
        x = hidden.clone().requires_grad_()
        output, _ = layer(x, previous)
        (output * weight).sum().backward()
        return [output, x.grad, *(p.grad.clone() for p in layer.parameters())]

    together = run(False)
    assert len(launches) == 1
    for one, other in zip(together, run(True), strict=True):
        # Another order of addition and nothing else.
        assert_close(other, one, "apart", FP32)
    assert len(launches) == 3
    assert launches[1] == 0


def test_who_uses_kernels(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernels, "have_triton", lambda: False)
    assert not kernels.use_kernels("auto")
    assert not kernels.use_kernels(False)
    with pytest.raises(RuntimeError, match=r"^fused \(True\) must have a GPU .* use auto$"):
        kernels.use_kernels(True)
    monkeypatch.setattr(kernels, "have_triton", lambda: True)
    assert kernels.use_kernels("auto")
    assert kernels.use_kernels(True)
    assert not kernels.use_kernels(False)


def test_interpreter_is_taken_only_where_it_is_asked_for(compiled):
    if DEVICE.type == "cuda":
        pytest.skip("kernels are compiled here")
    assert kernels.use_kernels(True)
    assert not kernels.use_kernels("auto")


def test_kernels_compile_for_hopper(tmp_path):
    # What the interpreter lets pass may not compile. A process of its own: in this one kernels are
    # interpreted. No GPU is needed; ptxas comes with Triton.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = succeeded(
        captured(
            [sys.executable, "-m", "tests.unit.moe.compile_kernels"],
            env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        )
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len({name for name, _, _ in lines}) == 10
    assert all(count >= 2 for count in Counter(name for name, _, _ in lines).values())
    # Registers that do not fit go through memory; Triton 3.6 lacks a few for the largest cases.
    most = 32 if version("triton").startswith("3.6.") else 0
    assert [line for line in lines if int(line[2]) > most] == []
