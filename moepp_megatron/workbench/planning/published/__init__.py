"""Results that others published, with their layouts, and the cost model's estimates for them.

`RESULTS` are the five that the model is judged by. `FURTHER` were measured by the same people with
other layouts, formats or software; they show how far the model carries. Routing was forced to
balance in all but one.
"""

from moepp_megatron.workbench.planning.published.compare import (
    PublishedComparison,
    compare,
    error_table,
    model_flop_per_token,
)
from moepp_megatron.workbench.planning.published.results import FURTHER, RESULTS, Published

__all__ = [
    "FURTHER",
    "RESULTS",
    "PublishedComparison",
    "Published",
    "compare",
    "error_table",
    "model_flop_per_token",
]
