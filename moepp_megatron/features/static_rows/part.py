"""Static rows: repeats a step whose FFN rows overflow the buffer, with as many as needed."""

import logging
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moepp_megatron.config import Layout
from moepp_megatron.moe.lane import use_static_rows
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.training.part import Fields, Part, PartContext, State, Step, Why
from moepp_megatron.training.step_sums import Summand, zeros

logger = logging.getLogger(__name__)

# Steps of which one may overflow without a warning. The first ones, not balanced yet, do not count.
_WINDOW = 1000


class StaticRowsPart(Part):
    """Decides for each step whether its layers have static rows.

    A step has them if the rows of the step before fit, whichever path it took. So a step runs twice
    only where a phase of overflow begins. `moe.static_rows` is set.
    """

    key = "static_rows"
    may_repeat = True

    def __init__(self, run: PartContext) -> None:
        self._factor = run.config.moe.static_rows or 0.0
        self._chunks = run.model.models
        self._layers = run.model.layers
        self._is_static = self._warned = False
        self._fits, self._repeated = True, 0
        self._overflows: list[tuple[int, float]] = []
        if run.config.moe.share_controller == "none" and dist.get_rank() == 0:
            logger.warning(
                "moe.static_rows (%s) has no moe.budget that holds the FFN share: layers whose "
                "share drifts up (0.998 was measured at tau 0.75) overflow, and steps then run "
                "without static rows",
                self._factor,
            )

    @staticmethod
    def is_wanted(run: PartContext) -> bool:
        """True with static rows."""
        return run.config.moe.static_rows is not None

    def begin_step(self, step: int, layout: Layout) -> None:
        """Choose the path of the step."""
        self._choose(self._fits)

    def _choose(self, is_static: bool) -> None:
        self._is_static = is_static
        for chunk in self._chunks:
            use_static_rows(chunk, is_static)

    def _fill(self) -> Tensor:
        """Largest number of rows of this rank's layers over the buffer's; float64 on the device."""
        fills = [layer.statistics.fill for layer in self._layers]
        known = [fill for fill in fills if fill is not None]
        return torch.stack(known).max() if known else zeros()

    def _largest_fill(self) -> float:
        """The fill of all ranks; a collective."""
        fill = self._fill()
        dist.all_reduce(fill, op=dist.ReduceOp.MAX)
        return float(fill)

    def summands(self) -> Sequence[Summand]:
        """The number of ranks that overflow."""
        return (self,)

    def summand(self) -> Tensor:
        """[1] float64 on the device: 1 where this rank overflows."""
        return (self._fill() > 1.0).double().reshape(1)

    def take_sum(self, total: Tensor) -> None:
        """Note whether any rank overflows."""
        self._fits = float(total) == 0.0

    def repeats(self) -> bool:
        """True if rows have been cut off."""
        is_wrong = self._is_static and not self._fits
        if is_wrong:
            self._repeated += 1
            self._choose(False)
        return is_wrong

    def end_step(self, step: Step) -> Iterator[Alert]:
        """Leave static rows until the next step; warn if they overflow too often."""
        # Passes in between, such as those over refused batches, are not watched.
        self._choose(False)
        first = step.number - _WINDOW
        self._overflows = [entry for entry in self._overflows if entry[0] > first]
        if not self._fits and first > 0:
            self._overflows.append((step.number, self._largest_fill()))
        if len(self._overflows) > 1 and not self._warned:
            self._warned = True
            enough = self._factor * max(fill for _, fill in self._overflows)
            yield Alert(
                step=step.number,
                rule="static_rows",
                metric="static_fill",
                value=self._overflows[-1][1],
                condition=f"above 1 in {len(self._overflows)} of the last {_WINDOW} steps, which "
                "ran without static rows",
                severity="warning",
                action="warn",
                remedy=f"moe.static_rows ({self._factor:g}) would have held them with {enough:.3g}",
            )

    def record(self, step: Step, fields: Fields) -> Fields:
        """The fill of the step, and how many have run again; a collective."""
        return {"static_fill": self._largest_fill(), "repeated_steps": self._repeated}

    def state(self) -> State:
        """The path of the next step, and the counts so far."""
        return {
            "fits": self._fits,
            "repeated": self._repeated,
            "overflows": [list(entry) for entry in self._overflows],
            "warned": self._warned,
        }

    def load(self, state: State, why: Why, step: int) -> Iterable[Alert]:
        """Continue from a state."""
        self._fits = state.get("fits", True)
        self._repeated = state.get("repeated", 0)
        self._overflows = [
            (int(number), float(fill)) for number, fill in state.get("overflows", ())
        ]
        self._warned = state.get("warned", False)
        return ()
