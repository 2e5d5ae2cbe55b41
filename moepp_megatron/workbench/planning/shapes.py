"""The expected shapes of one rank's parameters, by name."""

from __future__ import annotations

import re

from moepp_megatron.workbench.planning.grid import Grid
from moepp_megatron.workbench.planning.matmul import NamedShape
from moepp_megatron.workbench.planning.workload import Workload

Shape = tuple[int, ...]


def expected_shape(name: str, load: Workload, grid: Grid) -> Shape | None:
    """Shape of a parameter on a rank, or None for a name that this module does not know.

    Args:
        name: Name in megatron-core's GPTModel, with its own or Transformer Engine's modules.
        load: The model.
        grid: The layout.
    """
    for pattern, shape in _shapes(load, grid):
        if re.search(pattern, name):
            return shape
    return None


def _shapes(load: Workload, grid: Grid) -> list[NamedShape]:
    """Shapes by patterns of names; the first pattern that fits decides."""
    experts, hidden = load.experts, load.hidden
    width = experts.ffn_size // grid.etp
    shared, dense = experts.shared_size // grid.tp, load.dense_size // grid.tp
    vocabulary = (load.vocab // grid.tp, hidden)
    wide = experts.num_experts
    return [
        *load.attention.named_shapes(hidden, grid.tp),
        (r"(layer_?norm|norm)(\.|_)weight$", (hidden,)),
        (r"word_embeddings\.weight$|output_layer\.weight$", vocabulary),
        # Multi-token prediction: two vectors to one.
        (r"eh_proj\.weight$", (hidden // grid.tp, 2 * hidden)),
        (r"shared_experts\.gate_weight$", (1, hidden)),
        (r"shared_experts\.linear_fc1\.weight$", (2 * shared, hidden)),
        (r"shared_experts\.linear_fc2\.weight$", (hidden, shared)),
        # One module an expert, or one weight an expert of a grouped module.
        (r"\.experts\..*linear_fc1\.weight\d*$", (2 * width, hidden)),
        (r"\.experts\..*linear_fc2\.weight\d*$", (hidden, width)),
        (r"mlp\.linear_fc1\.weight$", (2 * dense, hidden)),
        (r"mlp\.linear_fc2\.weight$", (hidden, dense)),
        (r"router\.residual_weight$", (wide, wide)),
        # With a two-layer gate the first of the two weights.
        *zip(
            (r"router\.weight$", r"router\.output_weight$"),
            experts.gate_shapes(hidden),
            strict=False,
        ),
        *((rf"zero_computation\.{name}$", shape) for name, shape in experts.local_weights(hidden)),
    ]
