"""The times when a pilot may be decided, and the confidence that a decision needs.

A pilot may be looked at after every `first` seeds: after the k-th look's k * first seeds. Somebody
who looks again and again until something is decided would decide wrongly more often than the level
says, and so would somebody who asks for several arms and takes the best. So each look spends half
of what is left of the error that is allowed, and the arms share it equally: look k of m arms has
the level LEVEL / (m 2^k). The sum over any number of looks and all arms is at most LEVEL, whatever
the dependence between them (the union bound; a spending function in the sense of Lan and DeMets,
Biometrika 70, 1983, fixed before the first run).
"""

from __future__ import annotations

LEVEL = 0.025
"""How often, at most, a pilot may say "pays" where MoE++ does not: any number of arms and looks."""


FEWEST_SEEDS = 3
"""Seeds of a look, at least: with one or two there is next to nothing to tell the noise by."""


def level(look: int, num_arms: int) -> float:
    """The one-sided level of look 1, 2, ... for each of `num_arms` MoE++ arms."""
    return LEVEL / (num_arms * 2**look)


def look_of(num_seeds: int, first: int) -> int:
    """The newest look that `num_seeds` finished seeds allow; 0 before the first one."""
    return num_seeds // first
