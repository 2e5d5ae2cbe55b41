"""Score functions inside the router's kernels; `moepp_megatron.moe.scores` defines them."""

import triton
import triton.language as tl
from triton.language import constexpr

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")


@triton.jit
def scores_of(  # type: ignore[no-untyped-def]
    logits, column, NUM_EXPERTS: constexpr, SCORE: constexpr
):
    """Scores of the tile's experts, 0 in the other columns."""
    is_expert = (column < NUM_EXPERTS)[None, :]
    if SCORE == "softmax":
        scores = shares_of(logits, is_expert)
    elif SCORE == "sigmoid":
        scores = tl.where(is_expert, _sigmoid(logits), 0.0)
    else:
        scores = tl.where(is_expert, tl.exp(log_scores(logits, SCORE)), 0.0)
    return scores


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _softplus(x):  # type: ignore[no-untyped-def]
    """log(1 + e^x), exact relative to itself where 1 + e^x is rounded too."""
    power = tl.exp(-tl.abs(x))
    total = 1.0 + power
    rounded = total - 1.0
    log = tl.log(total) * (power / tl.where(rounded == 0.0, 1.0, rounded))
    return tl.maximum(x, 0.0) + tl.where(rounded == 0.0, power, log)


@triton.jit
def log_scores(logits, SCORE: constexpr):  # type: ignore[no-untyped-def]
    """Logarithms of the scores; those of a softmax up to a constant for each token."""
    if SCORE == "softmax":
        logs = logits
    elif SCORE == "sigmoid":
        logs = tl.minimum(logits, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logits)))
    else:
        tl.static_assert(SCORE == "sqrtsoftplus")
        # The softplus of such logits is e^z in fp32.
        logs = 0.5 * tl.where(logits < -16.0, logits, tl.log(_softplus(logits)))
    return logs


@triton.jit
def slope_of_logs(logits, SCORE: constexpr):  # type: ignore[no-untyped-def]
    """The derivative of `log_scores` of one logit; that of a softmax is 1."""
    if SCORE == "sigmoid":
        slope = _sigmoid(-logits)
    else:
        tl.static_assert(SCORE == "sqrtsoftplus")
        slope = 0.5 * tl.where(logits < -16.0, 1.0, _sigmoid(logits) / _softplus(logits))
    return slope


@triton.jit
def shares_of(logs, counted):  # type: ignore[no-untyped-def]
    """A softmax over the counted columns, 0 in the others and where nothing is counted."""
    largest = tl.max(tl.where(counted, logs, float("-inf")), axis=1)
    powers = tl.where(counted, tl.exp(logs - largest[:, None]), 0.0)
    total = tl.sum(powers, axis=1)
    return powers / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def grad_of_logs(shares, grad):  # type: ignore[no-untyped-def]
    """The gradient of the logarithms from that of `shares_of`."""
    return shares * (grad - tl.sum(shares * grad, axis=1)[:, None])
