"""Decides, on all ranks alike, whether a step may change the model."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from moepp_megatron.config.schema import ResilienceSection

logger = logging.getLogger(__name__)

# The median absolute deviation of normally distributed values is their standard deviation / 1.4826.
_MAD_TO_STD = 1.4826
# Where the losses hardly differ (a tiny data set, a constant rate) the deviation says nothing:
# at the default threshold of 10, a jump is then at least a hundredth of the loss.
_SMALLEST_STD = 1e-3
# A median over less than this share of the window is too easily moved.
_SHARE_BEFORE_SPIKES = 4


class NumericalFailureError(RuntimeError):
    """Too many steps in a row were refused, and going back did not help or is impossible."""


class NumericalGuard:
    """Refuses steps with non-finite loss or gradients, or with a loss spike.

    The decision follows from sums over all ranks and from the losses accepted before, which every
    rank has; so all ranks decide alike.

    Args:
        settings: Section `resilience`.

    Attributes:
        recent_losses: Accepted losses, the newest last, at most `guard_window`. Whoever keeps
            checkpoints sets it, so that a resumed run judges as an unbroken one.
        last_reason: Why the newest refused step was refused.
    """

    def __init__(self, settings: ResilienceSection) -> None:
        self._settings = settings
        self.recent_losses: list[float] = []
        self.last_reason = ""
        self._skips_in_a_row = 0
        self._rollbacks_in_a_row = 0
        self._failed_at_step = 0

    def refuses(self, losses: Tensor, grad_norm: float) -> bool:
        """Judge a step before the optimizer acts; every rank must call.

        Args:
            losses: [2] this rank's sum of token losses and number of tokens.
            grad_norm: Gradient norm as this rank knows it.
        """
        reason = self._reason(losses, grad_norm)
        if reason is None:
            self._skips_in_a_row = 0
            return False
        self._skips_in_a_row += 1
        self.last_reason = reason
        return True

    @property
    def must_roll_back(self) -> bool:
        """Whether so many steps in a row were refused that the model itself is suspect."""
        return self._skips_in_a_row >= self._settings.guard_max_consecutive_skips

    def begin_rollback(self, step: int, has_checkpoint: bool) -> None:
        """Count a rollback from `step`.

        Raises:
            NumericalFailureError: If there is no checkpoint, or an earlier rollback did not help.
        """
        if step > self._failed_at_step:
            self._rollbacks_in_a_row = 0
        skips, most = self._skips_in_a_row, self._settings.guard_max_rollbacks
        what = f"{skips} steps in a row after step {step} were refused ({self.last_reason})"
        if not has_checkpoint:
            raise NumericalFailureError(
                f"{what} and there is no checkpoint to go back to; set checkpoint.save_interval, "
                "and look at the data, optimizer.lr and precision"
            )
        if self._rollbacks_in_a_row >= most:
            raise NumericalFailureError(
                f"{what}, {self._rollbacks_in_a_row} rollbacks (resilience.guard_max_rollbacks: "
                f"{most}) got no further; load an older checkpoint (checkpoint.load) or lower "
                "optimizer.lr"
            )
        self._rollbacks_in_a_row += 1
        self._failed_at_step = max(self._failed_at_step, step)
        self._skips_in_a_row = 0

    def _reason(self, losses: Tensor, grad_norm: float) -> str | None:
        """Why the step is refused, or None; accepted losses join `recent_losses`."""
        loss, num_bad_ranks = _over_all_ranks(losses, grad_norm)
        if num_bad_ranks > 0 or not math.isfinite(loss):
            return _describe_non_finite(losses, grad_norm)
        recent, settings = self.recent_losses, self._settings
        if len(recent) * _SHARE_BEFORE_SPIKES >= settings.guard_window:
            score = robust_z_score(loss, recent)
            if score >= settings.guard_threshold:
                return f"loss {loss:.4f} is a spike: robust z-score {score:.1f}"
        recent.append(loss)
        del recent[: -settings.guard_window]
        return None


def _over_all_ranks(losses: Tensor, grad_norm: float) -> tuple[float, int]:
    """The token mean of the loss, and how many ranks see a number that is not finite."""
    is_bad = not (bool(losses.isfinite().all()) and math.isfinite(grad_norm))
    # Tensor-parallel ranks hold the same tokens: only the first of each group counts.
    counts = parallel_state.get_tensor_model_parallel_rank() == 0
    total, count = losses.tolist() if counts and not is_bad else (0.0, 0.0)
    sums = torch.tensor([total, count, float(is_bad)], dtype=torch.float64)
    sums = sums.to(torch.cuda.current_device())
    dist.all_reduce(sums)
    total, count, num_bad_ranks = sums.tolist()
    return (total / count if count > 0 else math.nan), int(num_bad_ranks)


def _describe_non_finite(losses: Tensor, grad_norm: float) -> str:
    """Which ranks see non-finite numbers, for the message; every rank must call."""
    mine = torch.tensor([float(losses[0]), grad_norm], device=torch.cuda.current_device())
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    parts = []
    for name, column in (("loss", 0), ("gradient norm", 1)):
        values = [float(pair[column]) for pair in everyone]
        ranks = [rank for rank, value in enumerate(values) if not math.isfinite(value)]
        if ranks:
            shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
            parts.append(f"{name} is {values[ranks[0]]} on rank {shown}")
    return "; ".join(parts) or "loss is not finite"


def robust_z_score(loss: float, recent: Sequence[float]) -> float:
    """Distance of `loss` above the median of `recent`, in robust standard deviations.

    Median and MAD, unlike mean and standard deviation, are not moved by the spikes themselves.

    Args:
        loss: Finite, nats.
        recent: Finite losses, at least one.
    """
    median = statistics.median(recent)
    deviation = statistics.median(abs(value - median) for value in recent)
    return (loss - median) / max(_MAD_TO_STD * deviation, _SMALLEST_STD * abs(median), 1e-30)
