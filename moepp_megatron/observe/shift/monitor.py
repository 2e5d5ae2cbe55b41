"""All series of a run, judged together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.observe.expert_usage import Counts
from moepp_megatron.observe.shift.detector import Numbers
from moepp_megatron.observe.shift.losses import SourceShift
from moepp_megatron.observe.shift.noise import UsageNoise
from moepp_megatron.observe.shift.reading import ShiftFinding, ShiftReading, ShiftStory
from moepp_megatron.observe.shift.routing import RoutingDetector
from moepp_megatron.observe.shift.tokens import TokenDetector

# Data sources that an alert names.
_MOST_SOURCES = 3


class ShiftMonitor:
    """Judges one step after the other by routing, loss, token ids and data sources.

    Args:
        settings: Settings of the configuration.
        sources: Names of the data sources; a single one is not judged.
        reference: [L, E] counts of another run to compare with instead of a line; None for none.
        noise: Initial noise, from the run of `reference`.
    """

    def __init__(
        self,
        settings: ShiftSection,
        sources: Sequence[str] = (),
        reference: Counts | None = None,
        noise: UsageNoise | None = None,
    ) -> None:
        self._routing = RoutingDetector(settings, reference, noise)
        self._tokens = TokenDetector(settings)
        self._sources = SourceShift(settings, sources) if len(sources) > 1 else None

    @property
    def noise(self) -> UsageNoise:
        """Differences of usual steps from their forecasts; unknown while the reference is fixed."""
        return self._routing.noise

    def add(
        self,
        experts: Counts,
        loss: float,
        spread: float = math.nan,
        tokens: Numbers | None = None,
        sources: Numbers | None = None,
    ) -> ShiftReading | None:
        """Judge a step and learn from it; everything is over all ranks.

        Args:
            experts: [L, E] selections of each expert.
            loss: Language-model loss in nats; NaN where there is none.
            spread: Standard deviation of the sequences' losses; NaN likewise.
            tokens: [GROUPS] tokens of each group of ids; None where they are not counted.
            sources: [sources, 2] sum of token losses in nats, and tokens; None likewise.

        Returns:
            None until there is enough to compare with.
        """
        self._routing.add(experts, loss, spread)
        known: dict[str, Any] = {}
        if tokens is not None:
            known["tokens"] = self._tokens.add(tokens)
        if self._sources is not None and sources is not None:
            known["source"] = self._sources.add(sources)
        known = {name: value for name, value in known.items() if not math.isnan(value)}
        reading = self._routing.reading
        if known:
            reading = replace(reading or ShiftReading(math.nan, math.nan, "data"), **known)
        if reading is not None and self._tokens.over_limit > 1.0:
            reading = replace(reading, cause="data")
        return reading

    def explain(self, moved: Callable[[ShiftFinding], list[str]]) -> ShiftStory | None:
        """What the newest reading is about, with what `moved` says of routing; None if nothing."""
        stories: list[ShiftStory] = []
        finding = self._routing.explain()
        if finding is not None:
            stories.append(ShiftStory.of(finding, moved(finding)))
        if self._tokens.over_limit > 1.0:
            line = f"{self._tokens.moved:.1%} of the tokens in other groups of ids"
            stories.append(ShiftStory("data", self._tokens.steps, None, [line]))
        if self._sources is not None and (lines := self._sources.moved()):
            stories.append(ShiftStory("source", self._sources.steps, None, lines[:_MOST_SOURCES]))
        return sum(stories[1:], stories[0]) if stories else None

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON; `load_state_dict` restores it bit for bit."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; series that it does not have begin anew."""
        for name, part in self._parts().items():
            if name in state:
                part.load_state_dict(state[name])

    def _parts(self) -> dict[str, RoutingDetector | TokenDetector | SourceShift]:
        sources = {} if self._sources is None else {"sources": self._sources}
        return {"monitor": self._routing, "tokens": self._tokens, **sources}
