"""The times when a pilot may be decided, and the confidence that a decision needs.

A pilot may be looked at after every `first` seeds: after the k-th look's k * first seeds. Somebody
who looks again and again until something is decided would decide wrongly more often than the level
says. So each look spends half of what is left of the error that is allowed: look k has the level
LEVEL / 2^k. The sum over any number of looks is at most LEVEL, whatever the dependence between them
(the union bound; a spending function in the sense of Lan and DeMets, Biometrika 70, 1983, fixed
before the first run).
"""

from __future__ import annotations

LEVEL = 0.025
"""How often, at most, a pilot may say "pays" where MoE++ does not, in any number of looks."""


FEWEST_SEEDS = 3
"""Seeds of a look, at least: one or two hardly show the noise."""


def level(look: int) -> float:
    """The one-sided level of look 1, 2, ..."""
    return LEVEL / 2**look


def look_of(num_seeds: int, first: int) -> int:
    """The newest look that `num_seeds` finished seeds allow; 0 before the first one."""
    return num_seeds // first
