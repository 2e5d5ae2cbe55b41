"""The gate's logits and the constant experts' mixing logits are one product."""

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moepp_megatron.moe.config import MoEPPConfig
from tests.unit.moe.builders import HIDDEN, build_layer

TOKENS, BATCH = 7, 3
SHAPE = (TOKENS * BATCH, HIDDEN)
BF16 = {"params_dtype": torch.bfloat16, "bf16": True}


class Passes(TorchDispatchMode):
    """Counts conversions of the hidden states to fp32, and products that read or write them."""

    def __init__(self):
        super().__init__()
        self.casts, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "_to_copy" and result.shape == SHAPE and result.dtype == torch.float32:
            self.casts += 1
        tensors = tree_leaves((args, result))
        is_product = name in ("mm", "addmm_")
        if is_product and any(tensor.shape in (SHAPE, SHAPE[::-1]) for tensor in tensors):
            self.products += 1
        return result


def passes(layer, moepp):
    """Of only router and zero-computation experts, forward and backward."""
    hidden = torch.randn(TOKENS, BATCH, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    previous = torch.randn(TOKENS, BATCH, moepp.num_experts)
    with Passes() as forward:
        routing = layer.router(hidden, previous, None, None, layer.zero_computation.mixing_rows)
        output = layer.local_output(hidden, routing, None)
        loss = output.float().sum() + routing.logits.sum()
    with Passes() as backward:
        loss.backward()
    for name, parameter in layer.named_parameters():
        if "mixing_weight" in name or name == "router.weight":
            assert parameter.grad is not None, name
    return forward, backward


# Changes of the MoE++ settings, of megatron-core's, products of gate and mixing.
CASES = [
    ({}, {}, 1),
    ({"two_layer_gate": True}, {}, 1),
    ({"num_constant_experts": 6}, {}, 1),
    ({"num_constant_experts": 0}, {}, 1),
    # The gate sees other hidden states than the constant experts.
    ({}, {"moe_input_jitter_eps": 0.1}, 2),
]


@pytest.mark.parametrize(("moe", "changes", "products"), CASES)
def test_hidden_states_become_fp32_once_a_pass(moe, changes, products):
    moepp = MoEPPConfig(4, **moe)
    forward, backward = passes(build_layer(moepp, **BF16, **changes), moepp)
    # The weights' gradient reads them in fp32 once more; the test's own loss casts the output.
    assert forward.casts - 1 == products
    assert backward.casts == products
    # Backward a product for the hidden states and one for the weights.
    of_constants = 1 if moepp.num_constant_experts else 0
    assert forward.products == products + of_constants
    assert backward.products == 2 * products + 2 * of_constants


def test_weights_of_one_product_are_neighbours():
    """Or a layer's FFN experts lie between them in the order in which parameters are gathered."""
    layer = build_layer(
        MoEPPConfig(4), moe_shared_expert_intermediate_size=8, add_bias_linear=False
    )
    owners = dict.fromkeys(name.split(".")[0] for name, _ in layer.named_parameters())
    assert list(owners) == ["router", "zero_computation", "experts", "shared_experts"]


def gemm(A, B, out_dtype, layout, **unused):
    """Transformer Engine's product, which takes factors of one type (cuBLASLt)."""
    assert A.dtype == B.dtype, f"{A.dtype} times {B.dtype}"
    left = B.float().T if layout[1] == "T" else B.float()
    right = A.float().T if layout[0] == "T" else A.float()
    return [(left @ right).to(out_dtype)]


@pytest.mark.parametrize("moe", [{}, {"two_layer_gate": True}, {"num_constant_experts": 0}])
@pytest.mark.parametrize("jitter", [None, 0.1], ids=["joined", "apart"])
def test_transformer_engine_multiplies_what_it_can(monkeypatch, moe, jitter):
    moepp = MoEPPConfig(4, **moe)
    layer = build_layer(moepp, **BF16, moe_input_jitter_eps=jitter)
    products = []

    def counted(*args, **kwargs):
        products.append(kwargs["layout"])
        return gemm(*args, **kwargs)

    monkeypatch.setattr(moe_utils, "te_general_gemm", counted)
    passes(layer, moepp)
    assert {"TN", "NN", "NT"} == set(products)


def test_products_in_fp64_stay_apart():
    """fp64 is only for the gate, and both are what they are with one product in fp32."""
    moepp = MoEPPConfig(4)
    joined, apart = build_layer(moepp), build_layer(moepp, moe_router_dtype="fp64")
    apart.load_state_dict(joined.state_dict())
    hidden, previous = torch.randn(5, 2, HIDDEN), torch.randn(5, 2, moepp.num_experts)
    rows = joined.zero_computation.mixing_rows
    one, other = (layer.router(hidden, previous, None, None, rows) for layer in (joined, apart))
    assert other.logits.dtype == torch.float64
    assert other.mixing_logits is None
    # Sums of 16 products around 1 in fp32, unit roundoff 6e-8.
    torch.testing.assert_close(one.logits.double(), other.logits, rtol=0, atol=1e-5)
    tokens = hidden.flatten(0, 1)
    mixing = (layer.zero_computation.mixing(tokens, None) for layer in (joined, apart))
    with_router = joined.zero_computation.mixing(tokens, one.mixing_logits)
    for expected in mixing:
        torch.testing.assert_close(with_router, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("step", ["gating", "second_layer"])
def test_a_gate_that_somebody_has_changed_is_used(step):
    moepp = MoEPPConfig(4, gating_residual=False)
    layer = build_layer(moepp)
    hidden, rows = torch.randn(5, 2, HIDDEN), layer.zero_computation.mixing_rows
    before = layer.router(hidden, None, None, None, rows).logits
    own = getattr(layer.router, step)
    setattr(layer.router, step, lambda given: own(given) + 1)
    after = layer.router(hidden, None, None, None, rows)
    torch.testing.assert_close(after.logits, before + 1)
    assert (after.mixing_logits is None) == (step == "gating")
