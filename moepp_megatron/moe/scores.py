"""From router logits to scores: the one list of score functions.

All other code uses this list, except `kernels.router` and `interop/hf_files/modeling_moepp.py`,
which list what they compute and refuse the rest. Every score grows with its own logit, so logits
rank the experts as scores do.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moepp_megatron.moe.config import MoEPPConfig

# Below this logit, softplus(z) = log(1 + e^z) is e^z to the last bit of fp64, and its logarithm z.
_LEAST_LOGIT = -40.0


class _Score(NamedTuple):
    """A score function of logits [..., E]; `sums_to_one` if each token's scores do."""

    scores: Callable[[Tensor], Tensor]
    # Logarithms of the scores, which do not underflow, up to a constant for each token.
    logs: Callable[[Tensor], Tensor]
    sums_to_one: bool = False

    def shares(self, logits: Tensor, scores: Tensor) -> Tensor:
        """The scores, each token's divided by their sum."""
        return scores if self.sums_to_one else torch.softmax(self.logs(logits), dim=-1)


def _softplus(logits: Tensor) -> Tensor:
    # Not torch's, which returns its argument from 20 on.
    return -F.logsigmoid(-logits)


def _sqrt_softplus(logits: Tensor) -> Tensor:
    # Of the logarithm, since a square root has no slope at a softplus that has become 0.
    return _log_sqrt_softplus(logits).exp()


def _log_sqrt_softplus(logits: Tensor) -> Tensor:
    log = _softplus(logits.clamp(min=_LEAST_LOGIT)).log()
    return 0.5 * torch.where(logits < _LEAST_LOGIT, logits, log)


SCORES: dict[str, _Score] = {
    "softmax": _Score(partial(torch.softmax, dim=-1), lambda logits: logits, sums_to_one=True),
    "sigmoid": _Score(torch.sigmoid, F.logsigmoid),
    "sqrtsoftplus": _Score(_sqrt_softplus, _log_sqrt_softplus),
}


def score_of(config: MoEPPConfig) -> _Score:
    """The score function that `config.score_function` names; ValueError if it is not listed."""
    if config.score_function not in SCORES:
        known = " or ".join(SCORES)
        raise ValueError(f"score_function ({config.score_function}) is unknown; use {known}")
    return SCORES[config.score_function]


def ffn_scores(logits: Tensor, config: MoEPPConfig) -> Tensor:
    """[T, E] fp32 scores of a router without zero-computation experts: 0 for these."""
    scores_TF = score_of(config).scores(logits[:, : config.num_ffn_experts])
    return F.pad(scores_TF, (0, config.num_zero_computation_experts))
