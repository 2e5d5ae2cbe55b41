"""Judges all series of a run together: what has changed, since when, and why."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.observe.shift.detector import CHARTS, Detector, Numbers

Cause = Literal["unknown", "data", "router"]

# Groups of token ids, as many as `group_of` makes.
GROUPS = 64
# Metrics of the evidence, by the series that they are of.
_METRICS = {
    "routing_shift": ("routing",),
    "logit_shift": ("scale",),
    "loss_shift": ("loss", "spread"),
    "token_shift": ("tokens",),
}
# Series that faults of the model move, and those of them that are the routers'.
_OF_MODEL, _OF_ROUTERS = ("loss", "spread", "routing", "scale"), ("routing", "scale")
# Evidence of token ids, over its limit, that has come since the last calm step: less is no change.
_QUIET = 0.25
# Steps in which the beginning of a change is sought; evidence before the first suspect step from
# which the change is gradual; what is as good as the lowest.
_WINDOW, _GRADUAL, _LOW = 30, 0.35, 0.1
# Steps in which an alarm of the routers is confirmed, after which an unexplained level is the
# baseline, and after the last alarm of an event until it is over.
_CONFIRMED, _PATIENCE, _OVER = 2, 6, 10
_MOST_EXPERTS = 3


def group_of(token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Hash token ids, so that neighbouring ones, of alike tokens, are in different groups."""
    # The upper bits of the product with 2^32 / golden ratio (Knuth, The Art of Computer
    # Programming 3, 6.4).
    return (token_ids * 2654435769 & 0xFFFFFFFF) >> 26


@dataclass(frozen=True)
class Observed:
    """Observations of a step or a refused batch, over all ranks."""

    experts: Numbers  # [L, E] selections of each expert
    loss: float  # of the language model, in nats
    spread: float  # standard deviation of the sequences' losses; NaN for one sequence
    logits: Numbers  # [L] root mean square of the routers' logits
    tokens: Numbers  # [GROUPS] tokens of each group of ids

    def series(self) -> Iterator[tuple[str, Numbers, Numbers | float]]:
        """Iterate over name, numbers and their spread by chance, or 1, of what is known."""
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
    """A change, from its first evidence until it is over."""

    since: int  # first step that may be of the change
    first_alarm: int
    newest: int  # step with an alarm
    evidence: float = 0.0  # the largest, over its limit
    series: list[str] = field(default_factory=list)  # those that have raised an alarm
    cause: Cause = "unknown"
    moved: list[str] = field(default_factory=list)  # what has moved most, a text each
    is_fault: bool = False  # routing or logits have moved while token ids have not
    is_mended: bool = False  # the routers have been put back since

    @property
    def newest_healthy(self) -> int:
        """Newest step whose checkpoint has nothing of the change."""
        # A step shows the weights that the update of the step before it has left.
        return self.since - (1 if self.cause == "data" else 2)


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
        self, false_alarm_steps: float, layer_numbers: Sequence[int], experts: Sequence[str]
    ) -> None:
        self._layers, self._experts = list(layer_numbers), list(experts)
        groups = {"routing": len(self._layers)}
        self._detectors = {
            name: Detector(CHARTS[name], false_alarm_steps, groups.get(name, 1))
            for name in ("tokens", *_OF_MODEL)
        }
        self.event: ShiftEvent | None = None
        self.ended: ShiftEvent | None = None
        # The newest step in which nothing was suspect, and its evidence of token ids, NaN if not
        # judged.
        self._calm, self._calm_step = math.nan, 0
        # Step and evidence of each series in the newest steps.
        self._past: dict[str, list[list[float]]] = {}
        self._confirmed = 0
        self._newest: dict[str, Numbers] = {}

    def add(self, step: int, observed: Observed, is_refused: bool = False) -> None:
        """Judge a step, or a refused batch, and learn from it; `step` is its number."""
        self._newest = {}
        for name, values, unit in observed.series():
            if np.isfinite(values).all():
                self._newest[name] = values
                if not math.isnan(found := self._detectors[name].add(values, unit)):
                    self._past[name] = [*self._past.get(name, ()), [step, found]][-_WINDOW:]
        self._track(step, is_refused)

    def _evidence(self, *names: str) -> float:
        """Largest evidence of these series; NaN where none is judged."""
        found = [self._detectors[name].evidence for name in names]
        return max((value for value in found if not math.isnan(value)), default=math.nan)

    @property
    def metrics(self) -> dict[str, float]:
        """Evidence over its limit by metric; NaN of series that are not judged."""
        return {metric: self._evidence(*names) for metric, names in _METRICS.items()}

    @property
    def is_calm(self) -> bool:
        """True if no series is suspect, so the routers that made the step are healthy."""
        return self.event is None and not any(d.is_suspect for d in self._detectors.values())

    @property
    def is_loss_high(self) -> bool:
        """True if the loss of the newest step exceeds the upper limit of its trend."""
        detector, newest = self._detectors["loss"], self._newest.get("loss")
        return newest is not None and detector.is_alarm and bool(newest > detector.expected())

    @property
    def fault(self) -> float:
        """Evidence of the newest step that the routers are damaged, over its limit; else 0."""
        if self.event is None or not self.event.is_fault:
            return 0.0
        # More than they may be at fault.
        if self.event.cause == "unknown" and not self.is_loss_high:
            return 0.0
        # Routers that were put back have not helped if the loss is still off its trend.
        names = (*_OF_ROUTERS, "loss") if self.event.is_mended else _OF_ROUTERS
        alarms = [self._detectors[name] for name in names]
        return max((each.evidence for each in alarms if each.is_alarm), default=0.0)

    def _track(self, step: int, is_refused: bool) -> None:
        """Begin, continue or end the event."""
        alarmed = [name for name in self._newest if self._detectors[name].is_alarm]
        if alarmed and self.event is None:
            names = {"tokens", *alarmed}
            before = min(self._calm_step, *(self._last_low(name, step) for name in names))
            self.event, self._confirmed = ShiftEvent(before + 1, step, step), 0
        if self.event is None:
            if self.is_calm:
                self._calm, self._calm_step = self._evidence("tokens"), step
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
        if step - event.newest >= _OVER:
            self.event, self.ended = None, event

    def _last_low(self, name: str, step: int) -> int:
        """Last step before the evidence of this series rose to its alarm."""
        past = self._past.get(name, [])
        before = [found for at, found in past if at <= self._calm_step]
        if not before or before[-1] < _GRADUAL:
            return self._calm_step
        low = max(int(at) for at, found in past if found <= min(before) + _LOW)
        # A small change has evidence long before it is suspect, and before it has any it takes
        # about half as many steps as after.
        return max(step - (step - low) * 3 // 2, 0)

    def _cause(self, event: ShiftEvent) -> Cause:
        """Infer the cause from the series; token ids do not depend on the model."""
        if "tokens" in event.series or event.cause == "data":
            return "data"
        if event.is_fault:
            return event.cause
        tokens = self._evidence("tokens")
        # Token ids that are not judged say nothing.
        if math.isnan(tokens + self._calm):
            return "unknown"
        if tokens > self._calm + _QUIET:
            return "data"
        if routers := [name for name in event.series if name in _OF_ROUTERS]:
            event.is_fault = self._confirmed >= _CONFIRMED
            # What has come step by step, or is first seen in the loss, is not only of the routers.
            is_sudden = any(self._detectors[name].is_sudden for name in routers)
            is_first = event.series[0] in _OF_ROUTERS
            return "router" if event.is_fault and is_sudden and is_first else "unknown"
        return "unknown"

    def _accept(self, names: Sequence[str]) -> None:
        """Make the newest step the baseline of these series."""
        for name in names:
            self._detectors[name].reset_baseline(self._newest[name])
            self._past.pop(name, None)

    def resolve_fault(self, is_mended: bool) -> None:
        """Forget the evidence of routers that were put back, or accept them as they are."""
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
        counts = (self._calm_step, self._confirmed)
        return {
            "layers": list(self._layers),
            "detectors": {name: each.state() for name, each in self._detectors.items()},
            "calm": [None if math.isnan(self._calm) else self._calm, *counts],
            "past": dict(self._past),
            "event": None if self.event is None else asdict(self.event),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; series that it does not have begin anew."""
        same = state["layers"] == self._layers
        for name, detector in self._detectors.items():
            if name in state["detectors"] and (same or name not in _OF_ROUTERS):
                detector.load(state["detectors"][name])
        calm, self._calm_step, self._confirmed = state["calm"]
        self._calm = math.nan if calm is None else calm
        self._past = dict(state.get("past", {}))
        if state["event"] is not None:
            event = ShiftEvent(**state["event"])
            # Of an earlier version, which had other causes.
            event.cause = event.cause if event.cause in get_args(Cause) else "unknown"
            self.event = event
