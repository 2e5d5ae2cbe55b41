"""Compile megatron-core's fused functions as on a GPU; print each one's compilations and error.

Run as a module. On a GPU torch.compile has them; CPU ranks and the played GPU run them as written.
The rows of experts change in every step, and with the first change the size becomes a variable.
"""

import torch
from megatron.core.fusions import fused_bias_dropout, fused_bias_swiglu, fused_cross_entropy
from torch._dynamo.utils import counters

ROWS = (96, 160, 1, 333, 2048)
# Sequence length and micro-batch, of training and of what else calls the same layers.
SHAPES = ((64, 2), (64, 2), (48, 1))


def swiglu(rows):
    """Outputs and gradients of the FFN experts' activation, times the gates."""
    projected = torch.randn(rows, 64, dtype=torch.bfloat16, requires_grad=True)
    gates = torch.rand(rows, 1, requires_grad=True)
    output = fused_bias_swiglu.weighted_bias_swiglu_impl(projected, None, gates)
    output.backward(torch.randn(rows, 32).bfloat16())
    return [output, projected.grad, gates.grad]


def bias_dropout_add(length, sequences):
    """The residual addition of attention and experts, and its gradients."""
    x, residual = torch.randn(2, length, sequences, 32).bfloat16().unbind()
    x.requires_grad_()
    residual.requires_grad_()
    output = fused_bias_dropout.bias_dropout_add_fused_train((x, None), residual, 0.0)
    output.sum().backward()
    return [output, x.grad, residual.grad]


def cross_entropy(length, sequences):
    """`precision.cross_entropy: native`, of one tensor rank."""
    logits = torch.randn(length, sequences, 128).bfloat16()
    labels = torch.randint(128, (length, sequences))
    logits, largest = fused_cross_entropy.calculate_logits_max(logits)
    mask, labels, sums, exponentials = fused_cross_entropy.calculate_predicted_logits(
        logits, labels, largest, 0, 128
    )
    softmax, loss = fused_cross_entropy.calculate_cross_entropy_loss(exponentials, sums)
    grad = fused_cross_entropy.calculate_gradients(softmax, torch.ones_like(loss), mask, labels)
    return [loss, grad]


def report(function, sizes):
    """Print name, compilations of each compiled function, and the largest relative error."""
    counters.clear()
    torch._dynamo.reset()
    error = 0.0
    for seed, size in enumerate(sizes):
        torch.manual_seed(seed)
        compiled = function(*size)
        with torch.compiler.set_stance("force_eager"):
            torch.manual_seed(seed)
            written = function(*size)
        for one, other in zip(compiled, written, strict=True):
            scale = other.float().abs().max()
            error = max(error, float((one.float() - other.float()).abs().max() / scale))
    print(function.__name__, counters["stats"]["unique_graphs"], error)


def main():
    """All of them, in turn."""
    report(swiglu, tuple((rows,) for rows in ROWS))
    for function in (bias_dropout_add, cross_entropy):
        report(function, SHAPES)


if __name__ == "__main__":
    main()
