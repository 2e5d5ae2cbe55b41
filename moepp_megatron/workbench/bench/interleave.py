"""Times contestants in turn, so that other load on the machine affects all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moepp_megatron.workbench.bench import clock


@dataclass(frozen=True)
class Timed:
    """Times of one contestant.

    Attributes:
        seconds: One entry per round, in the order of the rounds.
    """

    seconds: list[float]

    @property
    def median_ms(self) -> float:
        """Median, milliseconds."""
        return statistics.median(self.seconds) * 1e3


def speedup(slow: Timed, fast: Timed) -> float:
    """How many times faster `fast` is: the median over rounds of the ratio within a round."""
    pairs = zip(slow.seconds, fast.seconds, strict=True)
    return statistics.median(s / f for s, f in pairs)


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Timed]:
    """Run all contestants once per round; each round begins with another one.

    The GPU is idle when a contestant begins, so that times do not mix.

    Args:
        contestants: What to time, by name.
        rounds: Rounds that count.
        warmup: Rounds before them, which do not count.
        progress: Called after each round.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        for index in range(len(names)):
            name = names[(index + number) % len(names)]
            clock.settle()
            began = clock.now()
            contestants[name]()
            ended = clock.now()
            clock.settle()
            if number >= 0:
                seconds[name].append(clock.seconds(began, ended))
        progress()
    return {name: Timed(values) for name, values in seconds.items()}
