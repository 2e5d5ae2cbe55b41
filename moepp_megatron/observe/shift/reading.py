"""The result of the detectors of shifts after a step, and what an alert says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from moepp_megatron.observe.expert_usage import ExpertUsage, difference
from moepp_megatron.observe.shift.detector import Numbers

Cause = Literal["data", "router", "optimizer", "source"]

_MOST_EXPERTS, _MOST_CLASSES = 3, 2
# Standard deviations below which a change is not worth a word.
_LEAST_SURPRISE = 2.0
_CLASSES = ("most frequent", "frequent", "rarer", "rarest")
_CAUSES: dict[Cause, str] = {
    "data": "the data: loss and routing, or token ids",
    "router": "the routers: routing alone",
    "optimizer": "the optimizer, or data that is routed alike: loss alone",
    "source": "data of one source: its loss",
}


@dataclass(frozen=True)
class ShiftReading:
    """What is known after a step.

    Attributes:
        routing: Evidence that the use of the experts has changed, over its limit; above 1 is a
            shift.
        loss: The same of the loss.
        cause: What they together say: the data move loss and routing, or make sequences differ, or
            have other token ids; a router moves the routing alone, an optimizer the loss.
        tokens: The same as `routing` of the token ids.
        source: The same of the loss of the data source that has moved most.

    The last two are None where they are not judged (yet), the first two then NaN.
    """

    routing: float
    loss: float
    cause: Cause
    tokens: float | None = None
    source: float | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """What is known, by the names of metrics."""
        found = {
            "routing_shift": self.routing,
            "loss_shift": self.loss,
            "token_shift": self.tokens,
            "source_shift": self.source,
        }
        return {
            k: value for k, value in found.items() if value is not None and not math.isnan(value)
        }

    @property
    def is_shift(self) -> bool:
        """Whether any is above its limit."""
        return any(value > 1.0 for value in self.metrics.values())


@dataclass(frozen=True, eq=False)
class ShiftFinding:
    """What has moved in routing and loss, in the steps that are kept apart.

    Attributes:
        cause: That of the newest reading of routing and loss.
        steps: How many steps these are.
        chance: Steps in which chance alone gives as much evidence once.
        before: [L, E] shares of the experts as forecast, mean over these steps.
        after: [L, E] the shares.
        surprise: [L, E] the change of the square roots, in standard deviations of a usual step's.
        loss_before: Loss as forecast, mean over these steps, nats.
        loss_after: The loss.
    """

    cause: Cause
    steps: int
    chance: float
    before: Numbers
    after: Numbers
    surprise: Numbers
    loss_before: float
    loss_after: float


@dataclass(frozen=True)
class ShiftStory:
    """What an alert of a shift says besides its value.

    Attributes:
        cause: What has changed.
        steps: Steps since when, the newest included.
        chance: Steps in which chance alone gives as much evidence once; None where loss and routing
            of all the data say nothing.
        moved: What has moved most, a line each.
    """

    cause: Cause
    steps: int
    chance: float | None
    moved: list[str]

    @classmethod
    def of(cls, finding: ShiftFinding, moved: list[str]) -> ShiftStory:
        """The story of a finding, with the change of the loss before the rest."""
        loss = f"loss {finding.loss_before:.2f} -> {finding.loss_after:.2f}"
        return cls(finding.cause, finding.steps, finding.chance, [loss, *moved])

    def __add__(self, other: ShiftStory) -> ShiftStory:
        """Both; other data are the cause of what else has moved."""
        return replace(
            self,
            cause="data" if other.cause == "data" else self.cause,
            steps=max(self.steps, other.steps),
            moved=self.moved + other.moved,
        )

    def of_metric(self, metric: str) -> ShiftStory:
        """The story of an alert on this metric: that on a source is about it, whatever else is."""
        return replace(self, cause="source") if metric == "source_shift" else self

    def text(self, step: int) -> str:
        """One line; `step` is the newest step."""
        since = step - self.steps + 1
        return f"{_CAUSES[self.cause]}; since step {since}; {', '.join(self.moved)}"


def moved_experts(
    finding: ShiftFinding, names: Sequence[str], layer_numbers: Sequence[int]
) -> list[str]:
    """The experts whose share has moved most compared with what is usual for them."""
    surprise = np.abs(finding.surprise)
    return [
        f"layer {layer_numbers[layer]} {names[expert]} {finding.before[layer, expert]:.1%} -> "
        f"{finding.after[layer, expert]:.1%}"
        for layer, expert in _largest(surprise, _MOST_EXPERTS)
    ]


def moved_classes(
    before: Sequence[ExpertUsage], now: ExpertUsage, layer_numbers: Sequence[int]
) -> list[str]:
    """The classes of token ids, by their frequency, whose FFN experts per token moved most.

    Args:
        before: Windows without a shift; one at least.
        now: The window of the shift, or as much of it as there is.
        layer_numbers: Global numbers of the MoE layers.
    """
    usual, shifted = _by_class(sum(before[1:], before[0])), _by_class(now)
    if usual.cells.shape[1] == 0:
        return []
    experts = usual.experts.shape[1]
    changes = np.abs(difference(shifted, usual).reshape(len(layer_numbers), -1)[:, experts:])
    of_usual, of_shifted = usual.ffn_per_token(), shifted.ffn_per_token()
    return [
        f"layer {layer_numbers[layer]} {_CLASSES[kind]} tokens {of_usual[layer, kind]:.2f} -> "
        f"{of_shifted[layer, kind]:.2f} FFN experts"
        for layer, kind in _largest(changes, _MOST_CLASSES)
    ]


def _largest(changes: Numbers, most: int) -> list[tuple[int, int]]:
    """Places of the largest changes that are worth a word."""
    order = np.argsort(-changes, axis=None, kind="stable")[:most]
    places = zip(*np.unravel_index(order, changes.shape), strict=True)
    return [place for place in places if changes[place] >= _LEAST_SURPRISE]


def _by_class(usage: ExpertUsage) -> ExpertUsage:
    """The usage with its cells added up over positions."""
    layers, cells, _ = usage.cells.shape
    if cells == 0:
        return usage
    by_class = usage.cells.reshape(layers, -1, len(_CLASSES), 2).sum(axis=1)
    return ExpertUsage(usage.experts, by_class)
