"""Decides, on all ranks alike, whether a batch may change the model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from moepp_megatron.config.schema import ResilienceSection
from moepp_megatron.training.resilience.refused_batches import BatchEvidence, Cause, num_needed
from moepp_megatron.training.step_sums import StepSums

# The median absolute deviation of normally distributed values is their standard deviation / 1.4826.
_MAD_TO_STD = 1.4826
# Where the losses hardly differ (a tiny data set, a constant rate) the deviation means nothing:
# at the default threshold of 10, a jump is then at least a hundredth of the loss.
_SMALLEST_STD = 1e-3
# A median over less than this share of the window is too easily moved.
_SHARE_BEFORE_SPIKES = 4


class NumericalFailureError(RuntimeError):
    """Too many batches in a row were refused, and nothing else could be done."""


class NumericalGuard:
    """Refuses batches with non-finite loss or gradients, or with a loss spike.

    The decision follows from rank 0's sums over all ranks and from the losses accepted before,
    which every rank has; so all ranks decide alike.

    Args:
        settings: Section `resilience`.

    Attributes:
        recent_losses: Accepted losses, the newest last, at most `guard_window`.
        recent_samples: First samples of the batches accepted, the newest last, at most as many.
        refused: The batches refused in a row, the newest last, as far as they have been noted.
        verdicts: Whether each of the newest batches was refused, at most `guard_window`, counted
            again when that has been reported.
        last_loss: Loss of the batch judged last, over all ranks; NaN where it or the gradients are
            not finite.
        last_reason: Why the newest refused batch was refused.
    """

    def __init__(self, settings: ResilienceSection) -> None:
        self._settings = settings
        self.recent_losses: list[float] = []
        self.recent_samples: list[int] = []
        self.refused: list[BatchEvidence] = []
        self.verdicts: list[bool] = []
        self.last_loss = math.nan
        self.last_reason = ""
        self._rollbacks_in_a_row = 0
        self._failed_at_step = 0

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, the same on every rank; later steps do not change it."""
        return {
            "recent_losses": list(self.recent_losses),
            "recent_samples": list(self.recent_samples),
            "refused_batches": [batch.state() for batch in self.refused],
            "verdicts": list(self.verdicts),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, which may lack entries; {} starts again."""
        self.recent_losses = list(state.get("recent_losses", ()))
        self.recent_samples = list(state.get("recent_samples", ()))
        refused = state.get("refused_batches", ())
        self.refused = [BatchEvidence.from_state(batch) for batch in refused]
        self.verdicts = list(state.get("verdicts", ()))

    def refuses(self, sums: StepSums, losses: Tensor) -> bool:
        """Judge a batch before the optimizer acts; every rank must call.

        Args:
            sums: The step's sums, whose loss has the same bits on every rank.
            losses: [2] this rank's sum of token losses and number of tokens, for the reason.
        """
        self.last_loss = loss = sums.loss
        refuses = not math.isfinite(loss) or not self.is_usual(loss)
        self.verdicts = [*self.verdicts, refuses][-self._settings.guard_window :]
        if not math.isfinite(loss):
            self.last_reason = _describe_non_finite(losses, sums.grad_norm)
        elif refuses:
            score = robust_z_score(loss, self.recent_losses)
            self.last_reason = f"loss {loss:.4f} is a spike: robust z-score {score:.1f}"
        else:
            self.forget_refused()
            self.recent_losses.append(loss)
            del self.recent_losses[: -self._settings.guard_window]
        return refuses

    def is_usual(self, loss: float) -> bool:
        """Whether a finite loss is no spike against the recent ones."""
        recent, settings = self.recent_losses, self._settings
        if len(recent) * _SHARE_BEFORE_SPIKES < settings.guard_window:
            return True
        return robust_z_score(loss, recent) < settings.guard_threshold

    def note_refused(self, selections_LE: Tensor) -> bool:
        """Note how the batch just refused was routed.

        Args:
            selections_LE: [MoE layers, E] float64 over all ranks.

        Returns:
            Whether so many in a row were refused that their cause must be found.
        """
        self.refused.append(BatchEvidence(self.last_loss, selections_LE))
        is_due = len(self.refused) >= self._settings.guard_max_consecutive_skips
        self.verdicts = [] if is_due else self.verdicts
        return is_due

    def many_refused(self) -> str:
        """A message about batches refused now and then; empty if they are few.

        They never are so many in a row that their cause is sought, and each is lost to training.
        """
        count, among = sum(self.verdicts), len(self.verdicts)
        if count < self._settings.guard_max_consecutive_skips:
            return ""
        self.verdicts = []
        return (
            f"{count} of the newest {among} batches refused, not all in a row "
            f"({self.last_reason}); see what their texts have in common, or raise "
            "resilience.guard_threshold"
        )

    def note_accepted(self, first_sample: int) -> None:
        """Note where in the data the batch just accepted begins."""
        self.recent_samples = [*self.recent_samples, first_sample][-self._settings.guard_window :]

    @property
    def samples_to_replay(self) -> list[int]:
        """First samples of those accepted batches that show whether the model is at fault."""
        return self.recent_samples[-num_needed(len(self.refused)) :]

    def action(self, cause: Cause) -> Literal["rollback", "accept", "pause", "stop"]:
        """What is done about batches refused in a row, by their cause."""
        if cause == "model":
            return "rollback"
        return self._settings.guard_new_data if cause == "data" else "stop"

    def accept_refused(self) -> None:
        """Take batches like the refused ones from now on: their losses are the usual ones."""
        self.load({"recent_losses": [batch.loss for batch in self.refused]})

    def forget_refused(self) -> None:
        """The next refused batch is the first in a row."""
        self.refused = []

    def begin_rollback(self, step: int, has_checkpoint: bool) -> None:
        """Count a rollback from `step`.

        Raises:
            NumericalFailureError: If there is no checkpoint, or an earlier rollback did not help.
        """
        if step > self._failed_at_step:
            self._rollbacks_in_a_row = 0
        skips, most = len(self.refused), self._settings.guard_max_rollbacks
        what = f"{skips} batches in a row after step {step} were refused ({self.last_reason})"
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
