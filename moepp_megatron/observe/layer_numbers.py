"""The numbers that MoE layers have in every record and view."""

from collections.abc import Sequence


def layer_numbers(known: Sequence[int], count: int) -> Sequence[int]:
    """The numbers that MoE layers have everywhere: those in the model, counted from 1.

    Args:
        known: Numbers of the run's MoE layers.
        count: Number of MoE layers in a record; if there are not as many known numbers, the result
            is 1 to `count`.
    """
    return known if len(known) == count else range(1, count + 1)
