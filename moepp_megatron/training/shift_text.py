"""What a shift is about, in words: layers, experts and classes of tokens that have moved most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moepp_megatron.observe.expert_usage import ExpertUsage, difference
from moepp_megatron.observe.shift_reading import Cause, ShiftFinding

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
        return cls(finding.reading.cause, finding.steps, finding.chance, [loss, *moved])

    def of_metric(self, metric: str) -> ShiftStory:
        """The story of an alert on this metric: that on a source is about it, whatever else is."""
        return replace(self, cause="source") if metric == "source_shift" else self

    def text(self, step: int) -> str:
        """One line; `step` is the newest step."""
        since = step - self.steps + 1
        return f"{_CAUSES[self.cause]}; since step {since}; {', '.join(self.moved)}"


def with_tokens(story: ShiftStory | None, steps: int, share: float) -> ShiftStory:
    """The story of a step whose token ids are a shift: whatever has moved besides, it is the data.

    Args:
        story: What loss and routing say; None where nothing.
        steps: Steps since when the token ids are others.
        share: Share of the tokens in other groups than usual.
    """
    line = f"{share:.1%} of the tokens in other groups of ids"
    if story is None:
        return ShiftStory("data", steps, None, [line])
    steps = max(steps, story.steps)
    return replace(story, cause="data", steps=steps, moved=[*story.moved, line])


def with_sources(story: ShiftStory | None, steps: int, lines: list[str]) -> ShiftStory:
    """The story with the data sources that have moved.

    Args:
        story: What all the data say; None where nothing.
        steps: Steps since when a source has moved.
        lines: A line for each; one at least.
    """
    if story is None:
        return ShiftStory("source", steps, None, lines)
    return replace(story, steps=max(steps, story.steps), moved=[*story.moved, *lines])


def moved_experts(
    finding: ShiftFinding, names: Sequence[str], layer_numbers: Sequence[int]
) -> list[str]:
    """The experts whose share has moved most beside what is usual for them."""
    surprise = np.abs(finding.surprise)
    order = np.argsort(-surprise, axis=None, kind="stable")[:_MOST_EXPERTS]
    lines = []
    for layer, expert in zip(*np.unravel_index(order, surprise.shape), strict=True):
        if surprise[layer, expert] >= _LEAST_SURPRISE:
            before, after = finding.before[layer, expert], finding.after[layer, expert]
            lines.append(
                f"layer {layer_numbers[layer]} {names[expert]} {before:.1%} -> {after:.1%}"
            )
    return lines


def moved_classes(
    before: Sequence[ExpertUsage], now: ExpertUsage, layer_numbers: Sequence[int]
) -> list[str]:
    """The classes of token ids, by their frequency, whose FFN experts per token moved most.

    Args:
        before: Windows without a shift; one at least.
        now: The window of the shift, or as much of it as there is.
        layer_numbers: Global numbers of the MoE layers.
    """
    usual = _by_class(sum(before[1:], before[0]))
    shifted = _by_class(now)
    if usual.cells.shape[1] == 0:
        return []
    experts = usual.experts.shape[1]
    changes = np.abs(difference(shifted, usual).reshape(len(layer_numbers), -1)[:, experts:])
    of_usual, of_shifted = usual.ffn_per_token(), shifted.ffn_per_token()
    order = np.argsort(-changes, axis=None, kind="stable")[:_MOST_CLASSES]
    return [
        f"layer {layer_numbers[layer]} {_CLASSES[kind]} tokens {of_usual[layer, kind]:.2f} -> "
        f"{of_shifted[layer, kind]:.2f} FFN experts"
        for layer, kind in zip(*np.unravel_index(order, changes.shape), strict=True)
        if changes[layer, kind] >= _LEAST_SURPRISE
    ]


def _by_class(profile: ExpertUsage) -> ExpertUsage:
    """The profile with its cells added up over positions."""
    layers, cells, _ = profile.cells.shape
    if cells == 0:
        return profile
    by_class = profile.cells.reshape(layers, -1, len(_CLASSES), 2).sum(axis=1)
    return ExpertUsage(profile.experts, by_class)
