"""All series of a run, judged together: what has changed, since when, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.observe.shift.detector import ROWS, Detector, Numbers

Cause = Literal["unknown", "data", "router"]

GROUPS = 64
"""Groups of token ids; the number is that of `group_of`."""

# Series that faults of the model move, and those of them that are the routers'.
_OF_MODEL, _OF_ROUTERS = ("loss", "spread", "routing", "scale"), ("routing", "scale")
# Evidence of token ids, over its limit, that has come since the last calm step: less is no change.
_QUIET = 0.25
# Steps in which the beginning of a change is sought; evidence before the first suspect step from
# which it is no sudden one; what is as good as the lowest.
_LOOKS_BACK, _RISEN, _LOW = 30, 0.35, 0.1
# Steps in which an alarm of the routers is confirmed, after which what moves for no known cause is
# usual, and after the last alarm of an event until it is over.
_CONFIRMED, _PATIENCE, _LASTS = 2, 6, 10
_MOST_EXPERTS = 3


def group_of(token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """[...] group of each token id: the upper bits of its product with 2^32 / golden ratio.

    Neighbouring ids, which tokenizers give to alike tokens, are in different groups (Knuth, The Art
    of Computer Programming 3, 6.4).
    """
    return (token_ids * 2654435769 & 0xFFFFFFFF) >> 26


@dataclass(frozen=True)
class Observed:
    """Observations of a step or a refused batch, over all ranks.

    Attributes:
        experts: [L, E] selections of each expert.
        loss: Language-model loss in nats.
        spread: Standard deviation of the sequences' losses; NaN for one sequence.
        logits: [L] root mean square of the routers' logits.
        tokens: [GROUPS] tokens of each group of ids.
    """

    experts: Numbers
    loss: float
    spread: float
    logits: Numbers
    tokens: Numbers

    def series(self) -> Iterator[tuple[str, Numbers, Numbers | float]]:
        """Name, numbers and their spread by chance, or 1, of what is known."""
        yield "loss", np.array([self.loss]), 1.0
        if self.spread > 0.0:
            yield "spread", np.array([math.log(self.spread)]), 1.0
        # The noise of the square root of a share does not depend on it (Hellinger).
        totals = self.experts.sum(axis=1, keepdims=True)
        if (totals > 0).all():
            unit = np.repeat(0.5 / np.sqrt(totals), self.experts.shape[1])
            yield "routing", np.sqrt(self.experts / totals).ravel(), unit
        if (self.logits > 0).all():
            yield "scale", np.log(self.logits), 1.0
        if (total := float(self.tokens.sum())) > 0:
            yield "tokens", np.sqrt(self.tokens / total), 0.5 / math.sqrt(total)


@dataclass
class ShiftEvent:
    """A change, from its first evidence until it is over.

    Attributes:
        since: First step that may be of the change.
        first_alarm: First step with an alarm.
        newest: Newest step with an alarm.
        evidence: Largest evidence over its limit.
        series: Names of the series that have raised an alarm.
        cause: What has changed, as far as it is known.
        moved: What has moved most, a text each.
        is_fault: Whether the routers' series are away while token ids are not.
        is_mended: Whether the routers have been put back since.
    """

    since: int
    first_alarm: int
    newest: int
    evidence: float = 0.0
    series: list[str] = field(default_factory=list)
    cause: Cause = "unknown"
    moved: list[str] = field(default_factory=list)
    is_fault: bool = False
    is_mended: bool = False


class ShiftMonitor:
    """Judges all series of one step after the other.

    Args:
        false_alarm_steps: Steps in which chance may give one alarm of a series.
        layer_numbers: Global numbers of the MoE layers.
        experts: Names of the experts.

    Attributes:
        event: The change that is under way; None without one.
        ended: The newest change that is over; None without one.
    """

    def __init__(
        self,
        false_alarm_steps: float,
        layer_numbers: Sequence[int],
        experts: Sequence[str],
    ) -> None:
        self._layers, self._experts = list(layer_numbers), list(experts)
        self._rarity = false_alarm_steps
        self._detectors = {name: self._detector(name) for name in ("tokens", *_OF_MODEL)}
        self.event: ShiftEvent | None = None
        self.ended: ShiftEvent | None = None
        # Evidence of token ids, None where they were not judged, and the step's number, when
        # nothing was suspect last.
        self._calm: float | None = None
        self._calm_step = 0
        # Step and evidence of each series in the newest steps.
        self._past: dict[str, list[list[float]]] = {}
        self._confirmed = 0
        self._newest: dict[str, Numbers] = {}

    def _detector(self, name: str) -> Detector:
        groups = len(self._layers) if name == "routing" else 1
        return Detector(ROWS[name], self._rarity, groups)

    def add(self, step: int, observed: Observed, is_refused: bool = False) -> None:
        """Judge a step, or a refused batch, and learn from it; `step` is its number."""
        self._newest = {}
        for name, values, unit in observed.series():
            if np.isfinite(values).all():
                self._newest[name] = values
                if not math.isnan(found := self._detectors[name].add(values, unit)):
                    self._past[name] = [*self._past.get(name, ()), [step, found]][-_LOOKS_BACK:]
        self._see(step, is_refused)

    def _evidence(self, *names: str) -> float:
        """Largest evidence of these series; NaN where none is judged."""
        found = [self._detectors[name].evidence for name in names]
        return max((value for value in found if not math.isnan(value)), default=math.nan)

    @property
    def metrics(self) -> dict[str, float]:
        """Evidence over its limit, by names of metrics; NaN of series that are not judged."""
        return {
            "routing_shift": self._evidence("routing"),
            "logit_shift": self._evidence("scale"),
            "loss_shift": self._evidence("loss", "spread"),
            "token_shift": self._evidence("tokens"),
        }

    @property
    def is_calm(self) -> bool:
        """True if no series is suspect, so the routers that made the step are healthy."""
        return self.event is None and not any(d.is_suspect for d in self._detectors.values())

    @property
    def is_loss_high(self) -> bool:
        """True if the loss of the newest step exceeds the upper limit of its course."""
        detector, newest = self._detectors["loss"], self._newest.get("loss")
        return newest is not None and detector.is_alarm and bool(newest > detector.expected())

    @property
    def fault(self) -> float:
        """Evidence of the newest step that the routers are damaged, over its limit; else 0.

        Where more than they may be at fault, only while the loss is above its limit. Once they
        have been put back, a loss that stays away from its course says so too.
        """
        if self.event is None or not self.event.is_fault:
            return 0.0
        if self.event.cause == "unknown" and not self.is_loss_high:
            return 0.0
        names = (*_OF_ROUTERS, "loss") if self.event.is_mended else _OF_ROUTERS
        alarms = [self._detectors[name] for name in names]
        return max((each.evidence for each in alarms if each.is_alarm), default=0.0)

    def _see(self, step: int, is_refused: bool) -> None:
        """Begin, continue or end the event."""
        alarmed = [name for name in self._newest if self._detectors[name].is_alarm]
        if alarmed and self.event is None:
            names = {"tokens", *alarmed}
            before = min(self._calm_step, *(self._last_low(name, step) for name in names))
            self.event, self._confirmed = ShiftEvent(before + 1, step, step), 0
        if self.event is None:
            if self.is_calm:
                self._calm, self._calm_step = self._token_evidence(), step
            return
        event = self.event
        if alarmed:
            event.newest = step
            event.series += [name for name in alarmed if name not in event.series]
            top = max(self._detectors[name].evidence for name in alarmed)
            event.evidence = max(event.evidence, top)
            # Of a refused batch the weights have not changed: it says what its predecessor said.
            self._confirmed += not is_refused
        cause = self._cause(event)
        if alarmed and (cause != event.cause or not event.moved):
            event.moved = list(self._moved(event))
        event.cause = cause
        has_waited = step - event.first_alarm >= _PATIENCE
        if cause == "data" or (not event.is_fault and has_waited):
            self._accept(alarmed)
        if cause == "data":
            # Also what is only suspect, or it would raise an alarm of its own later.
            self._accept([name for name in self._newest if self._detectors[name].is_suspect])
        if step - event.newest >= _LASTS:
            self.event, self.ended = None, event

    def _last_low(self, name: str, step: int) -> int:
        """The last step before the evidence of this series has risen to an alarm."""
        past = self._past.get(name, [])
        before = [found for at, found in past if at <= self._calm_step]
        if not before or before[-1] < _RISEN:
            return self._calm_step
        low = max(int(at) for at, found in past if found <= min(before) + _LOW)
        # A small change has evidence long before it is suspect, and before it has any it takes
        # about half as many steps as after.
        return max(step - (step - low) * 3 // 2, 0)

    def _token_evidence(self) -> float | None:
        """Evidence of token ids; None where they are not judged, which says nothing."""
        evidence = self._detectors["tokens"].evidence
        return None if math.isnan(evidence) else evidence

    def _cause(self, event: ShiftEvent) -> Cause:
        """Combine the series to a cause; token ids do not depend on the model."""
        if "tokens" in event.series or event.cause == "data":
            return "data"
        if event.is_fault:
            return event.cause
        tokens = self._token_evidence()
        if tokens is None or self._calm is None:
            return "unknown"
        if tokens > self._calm + _QUIET:
            return "data"
        if routers := [name for name in event.series if name in _OF_ROUTERS]:
            event.is_fault = self._confirmed >= _CONFIRMED
            # What has come step by step, or is first seen in the loss, is not of the routers alone.
            is_sudden = any(self._detectors[name].is_sudden for name in routers)
            is_first = event.series[0] in _OF_ROUTERS
            return "router" if event.is_fault and is_sudden and is_first else "unknown"
        return "unknown"

    def _accept(self, names: Sequence[str]) -> None:
        """Take the current level of these series as the usual one."""
        for name in names:
            self._detectors[name].reset_baseline(self._newest[name])
            self._past.pop(name, None)

    def settle(self, is_mended: bool) -> None:
        """After a fault of the routers: they are as before, or what they are now is usual."""
        if self.event is not None:
            self.event.is_mended = is_mended
        for name in _OF_MODEL:
            if is_mended:
                self._detectors[name].clear()
            elif name in self._newest and self._detectors[name].is_alarm:
                self._accept([name])

    def _moved(self, event: ShiftEvent) -> Iterator[str]:
        """List what has moved most, one text each."""
        if "loss" in self._newest:
            before, after = self._detectors["loss"].expected()[0], self._newest["loss"][0]
            yield f"loss {before:.2f} -> {after:.2f}"
        if "tokens" in event.series:
            shares = [self._detectors["tokens"].expected(), self._newest["tokens"]]
            before, after = (np.square(each) / np.square(each).sum() for each in shares)
            yield f"{np.abs(after - before).sum() / 2:.1%} of the tokens in other groups of ids"
        if "routing" in event.series and "routing" in self._newest:
            yield from self._moved_experts()
        if "scale" in event.series and "scale" in self._newest:
            change = self._newest["scale"] - self._detectors["scale"].expected()
            row = int(np.abs(change).argmax())
            yield f"logits of layer {self._layers[row]} {math.exp(change[row]):.2g} times as large"

    def _moved_experts(self) -> Iterator[str]:
        """The experts whose share has moved most."""
        before, after = self._detectors["routing"].expected(), self._newest["routing"]
        for place in np.argsort(-np.abs(after - before), kind="stable")[:_MOST_EXPERTS]:
            layer, expert = divmod(int(place), len(self._experts))
            shares = f"{max(before[place], 0.0) ** 2:.1%} -> {after[place] ** 2:.1%}"
            yield f"layer {self._layers[layer]} {self._experts[expert]} {shares}"

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, of plain numbers and names, the same on every rank."""
        return {
            "layers": list(self._layers),
            "detectors": {name: each.state() for name, each in self._detectors.items()},
            "calm": [self._calm, self._calm_step, self._confirmed],
            "past": dict(self._past),
            "event": None if self.event is None else asdict(self.event),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; series that it does not have begin anew."""
        same = state["layers"] == self._layers
        for name, detector in self._detectors.items():
            if name in state["detectors"] and (same or name not in _OF_ROUTERS):
                detector.load(state["detectors"][name])
        self._calm, self._calm_step, self._confirmed = state["calm"]
        self._past = dict(state.get("past", {}))
        if state["event"] is not None:
            event = ShiftEvent(**state["event"])
            # Of an earlier version, which had other causes.
            event.cause = event.cause if event.cause in get_args(Cause) else "unknown"
            self.event = event
