"""Decides, on all ranks alike, whether a batch may change the model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moepp_megatron.config.schema import ResilienceSection
from moepp_megatron.observe.shift.detector import CHARTS, Detector
from moepp_megatron.runtime.distributed import gathered
from moepp_megatron.training.step_sums import StepSums

# Of the ways to part the batches into two groups of these sizes, the share that may part them by
# their routing at least as well as "before" and "refused" do.
SIGNIFICANCE = 0.05

Cause = Literal["model", "not finite", "data", "targets"]


@dataclass(frozen=True)
class BatchEvidence:
    """A model's loss and routing on a batch, the same on every rank.

    Attributes:
        loss: Language-model loss in nats; NaN where loss or gradients are not finite.
        selections_LE: [MoE layers, E] float64 selections that routers wanted, over all ranks.
    """

    loss: float
    selections_LE: Tensor

    def state(self) -> list[Any]:
        """Return plain data, with None for NaN: saving compares ranks, and NaN is not equal."""
        loss = None if math.isnan(self.loss) else self.loss
        return [loss, self.selections_LE.tolist()]

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> "BatchEvidence":
        """Undo `state`."""
        loss, selections = state
        known = math.nan if loss is None else loss
        return cls(known, torch.tensor(selections, dtype=torch.float64))


def num_needed(num_refused: int) -> int:
    """Batches from before the refused ones, for `_has_moved` to decide."""
    return max(num_refused, math.ceil(1 / SIGNIFICANCE / num_refused))


# Losses are compared with their course (`observe/shift/detector.py`), which follows a descent:
# a jump is one within a step. Where losses hardly differ their spread says nothing: the floor, in
# nats, is the least that counts.
_CHART = replace(CHARTS["loss"], level_rate=0.3, slope_rate=0.0, memory=40, floor=0.03)
# Distances from the course that must be known before one is a jump; the course takes three losses.
JUDGED = 20
# Newest batches whose first samples and verdicts are known.
_WINDOW = 128
# After a change that chance gives once in so many steps the course begins with the newest loss.
_FALSE_ALARM_STEPS = 10_000.0


class NumericalFailureError(RuntimeError):
    """Too many batches in a row were refused, and nothing else could be done."""


class NumericalGuard:
    """Refuses batches with non-finite loss or gradients, or with a loss spike.

    The decision follows from rank 0's sums over all ranks and from the losses accepted before,
    which every rank has; so all ranks decide alike. Messages name a parameter of `chunks`, the
    model, that is not finite.

    Attributes:
        recent_samples: First samples of the batches accepted, the newest last.
        refused: The batches refused in a row, the newest last, as far as they have been noted.
        verdicts: Whether each of the newest batches was refused; empty again once it is reported.
        last_loss: Loss of the batch judged last, over all ranks; NaN if it or a gradient is not
            finite.
        last_reason: Why the newest refused batch was refused.
    """

    def __init__(self, settings: ResilienceSection, chunks: Sequence[torch.nn.Module] = ()) -> None:
        self._settings, self._chunks = settings, chunks
        self.load({})
        self.last_loss = math.nan
        self.last_reason = ""
        self._is_empty = False
        self._rollbacks_in_a_row = 0
        self._failed_at_step = 0

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, the same on every rank; later steps do not change it."""
        return {
            "loss_course": self._course.state(),
            "recent_samples": list(self.recent_samples),
            "refused_batches": [batch.state() for batch in self.refused],
            "verdicts": list(self.verdicts),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, which may lack entries; so {} begins anew."""
        self._course = Detector(_CHART, _FALSE_ALARM_STEPS)
        if "loss_course" in state:
            self._course.load(state["loss_course"])
        self.recent_samples: list[int] = list(state.get("recent_samples", ()))
        refused = state.get("refused_batches", ())
        self.refused = [BatchEvidence.from_state(batch) for batch in refused]
        self.verdicts: list[bool] = list(state.get("verdicts", ()))

    def refuses(self, sums: StepSums, losses: Tensor) -> bool:
        """Judge a batch before the optimizer acts; every rank must call.

        `sums` has the same loss, to the bit, on every rank; `losses` is this rank's [2] sum of
        token losses and number of tokens, for the reason.
        """
        self.last_loss = loss = sums.loss
        self._is_empty = sums.tokens == 0 and math.isfinite(sums.total + sums.grad_norm)
        refuses = not math.isfinite(loss) or not self._is_within(loss, 1.0)
        self.verdicts = [*self.verdicts, refuses][-_WINDOW:]
        if self._is_empty:
            self.last_reason = "none of its tokens has a loss: loss_mask leaves out all of them"
        elif not math.isfinite(loss):
            self.last_reason = _describe_non_finite(losses, sums.grad_norm, self._chunks)
        elif refuses:
            score = self._course.distance(loss, JUDGED)
            expected = float(self._course.expected()[0])
            self.last_reason = (
                f"loss {loss:.4f} is {score:.1f} spreads above its course ({expected:.4f})"
            )
        else:
            self.forget_refused()
            values = np.array([loss])
            if self._course.add(values) > 1.0:
                self._course.reset_baseline(values)
        return refuses

    def is_sound(self, loss: float) -> bool:
        """True if a loss of batches trained on is nearer to recent losses than to the threshold."""
        return self._is_within(loss, 0.5)

    def _is_within(self, loss: float, share: float) -> bool:
        """True if a finite loss is within `share` of the threshold above recent ones."""
        distance = self._course.distance(loss, JUDGED)
        return distance is None or distance < share * self._settings.guard_threshold

    def note_refused(self, selections_LE: Tensor) -> bool:
        """Note the selections of the batch just refused, [MoE layers, E] float64 over all ranks.

        True if so many in a row were refused that their cause must be found. One without tokens to
        learn from does not count: its cause is known.
        """
        if self._is_empty:
            return False
        self.refused.append(BatchEvidence(self.last_loss, selections_LE))
        is_due = len(self.refused) >= self._settings.guard_max_consecutive_skips
        self.verdicts = [] if is_due else self.verdicts
        return is_due

    def many_refused(self) -> str:
        """Return an alert's text on batches refused now and then, not in a row; empty if few."""
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
        self.recent_samples = [*self.recent_samples, first_sample][-_WINDOW:]

    @property
    def samples_to_replay(self) -> list[int]:
        """First samples of those accepted batches that tell whether the model is at fault."""
        return self.recent_samples[-num_needed(len(self.refused)) :]

    def action(self, cause: Cause) -> Literal["rollback", "accept", "pause", "stop"]:
        """Action on batches refused in a row, by their cause."""
        if cause == "model":
            return "rollback"
        return self._settings.guard_new_data if cause == "data" else "stop"

    def accept_refused(self) -> None:
        """Accept batches like the refused ones from now on: their losses are the new baseline."""
        self._course.reset_baseline(np.array([self.refused[-1].loss]))

    def forget_refused(self) -> None:
        """The next refused batch is the first in a row."""
        self.refused = []

    def begin_rollback(self, step: int, has_checkpoint: bool) -> None:
        """Count a rollback from `step`; NumericalFailureError where there can be none."""
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


def _describe_non_finite(
    losses: Tensor, grad_norm: float, chunks: Sequence[torch.nn.Module]
) -> str:
    """Name the ranks and parameters with non-finite values; every rank must call."""
    here = float(losses[0]), grad_norm, _first_non_finite(chunks)
    of_losses, of_norms, names = zip(*gathered(here), strict=True)
    parts = []
    for name, values in (("loss", of_losses), ("gradient norm", of_norms)):
        ranks = [rank for rank, value in enumerate(values) if not math.isfinite(value)]
        if ranks:
            shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
            parts.append(f"{name} is {values[ranks[0]]} on rank {shown}")
    # A parameter before a gradient that it has made so.
    parts += sorted(filter(None, names), key=lambda name: name.startswith("gradient"))[:1]
    return "; ".join(parts) or "loss is not finite"


def _first_non_finite(chunks: Sequence[torch.nn.Module]) -> str | None:
    """The first parameter of this rank that is not finite, or else has such a gradient."""
    named = [pair for chunk in chunks for pair in chunk.named_parameters()]
    for what, attribute in (("parameter", "data"), ("gradient of", "main_grad")):
        for name, parameter in named:
            value = getattr(parameter, attribute, None)
            local = getattr(value, "to_local", lambda value=value: value)()
            if isinstance(local, Tensor) and not bool(local.isfinite().all()):
                return f"{what} {name} is not finite"
    return None
