"""Bytes that the kernels read and write, counted by hand."""

from __future__ import annotations

from moepp_megatron.workbench.bench import kernel_traffic


def test_traffic_by_hand():
    # 10 tokens of 3 experts: fp32 logits in; fp32 gates and a byte of the map out.
    assert kernel_traffic.router_forward(10, 3) == (120, 150)
    assert kernel_traffic.router_backward(10, 3) == (270, 120)
    sizes = {"num_experts": 5, "slots": 2, "num_used": 4, "num_copies": 1, "num_constants": 2}
    # A vector of 8 bf16 is 16 bytes. In: 7 rows, 4 inputs, 10 addends; for each token two numbers
    # of rows, three gates with a byte of the map each, and four mixing logits. Out: 10 outputs.
    small = 10 * (2 * 4 + 3 * 5 + 4 * 4)
    forward = kernel_traffic.combine_forward(10, 7, 8, 2, **sizes, has_addend=True)
    assert forward == (21 * 16 + small, 160)
    assert forward.total == sum(forward)
    # In: 10 gradients, 4 inputs. Out: gradients of 7 rows and 10 inputs, 5 gates and the logits.
    backward = kernel_traffic.combine_backward(10, 7, 8, 2, **sizes)
    assert backward == (14 * 16 + small, 17 * 16 + 10 * (5 * 4 + 4 * 4))
