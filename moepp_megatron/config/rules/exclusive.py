"""Features that exclude each other: the work that would join the two has not been done or tested.

A table with two axes: each pair is a feature that is refused, the feature with which it is, and
why. What a feature needs of values of other settings is a row in the file of that feature.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any, NamedTuple

from moepp_megatron.config.problem import Problem, show
from moepp_megatron.config.rules.rows import Rule
from moepp_megatron.config.schema import Config, Section


class _Feature(NamedTuple):
    """A feature.

    Attributes:
        switch: Dotted name of the setting that switches it on.
        off: The value of that setting without it.
        instead: What to do without it, where there is another way.
        effect: Dotted name of what has the effect, where the switch has it only with others.
    """

    switch: str
    off: Any
    instead: str = ""
    effect: str = ""

    def is_on(self, config: Config) -> bool:
        """Whether this configuration has the feature."""
        return bool(attrgetter(self.effect or self.switch)(config) != self.off)

    def named(self, config: Config) -> str:
        """The switch with its value, `model.mtp_num_layers (1)`; of a section the name."""
        value = attrgetter(self.switch)(config)
        return self.switch if isinstance(value, Section) else f"{self.switch} ({show(value)})"


CONSTANTS = _Feature("moe.constants_shared", False, effect="moe.shares_constants")
DOCUMENTS = _Feature("data.reset_attention_mask", False)
FP8 = _Feature("precision.fp8", None)
FUSED_ROUTER = _Feature("megatron.moe_router_fusion", False)
FP8_WEIGHTS = _Feature("precision.fp8_param", False)
GRAPHS = _Feature("training.cuda_graphs", [])
LATENT = _Feature("model.latent_attention", None)
MTP = _Feature("model.mtp_num_layers", 0)
OVERLAP = _Feature("parallel.overlap_moe_expert_parallel_comm", False)
RECOMPUTE = _Feature("training.recompute_granularity", None)
TASKS = _Feature("evaluation.tasks", [], "evaluate the exported model with lm_eval run")
ROUTES = [_Feature(f"routes.{name}", None) for name in ("record", "replay", "trace")]
TEACHER = _Feature("distillation.teacher", None)

# Refused, with what, and why.
PAIRS: tuple[tuple[_Feature, _Feature, str], ...] = (
    (CONSTANTS, OVERLAP, "each layer's backward pass runs by itself, which is not tested with it"),
    (CONSTANTS, MTP, "constants that are shared with these layers have not been tested"),
    (OVERLAP, MTP, "its schedule has no nodes for these layers that carry router logits"),
    (GRAPHS, MTP, "graphs of these layers have not been tested"),
    (FP8_WEIGHTS, MTP, "these layers have not been tested with weights in FP8"),
    (FP8_WEIGHTS, LATENT, "its projections have not been tested with weights in FP8"),
    (MTP, TEACHER, "a teacher's logits are those of the next token"),
    (DOCUMENTS, TEACHER, "a teacher is given no mask of documents"),
    (DOCUMENTS, GRAPHS, "a graph's inputs are of fixed sizes, without documents or padding"),
    (GRAPHS, RECOMPUTE, "a graph keeps its activations, and runs forward once for every backward"),
    (GRAPHS, OVERLAP, "that schedule calls the parts of a layer itself"),
    (GRAPHS, FP8, "megatron-core keeps a layer's FP8 state with each graph and updates it twice"),
    (TASKS, GRAPHS, "a graph has one length, and tasks have rows of many"),
    (TASKS, FP8, "Transformer Engine learns FP8's scales in evaluation too, and changes training"),
    (TASKS, OVERLAP, "its schedule wants a loss"),
    *((routes, GRAPHS, "a graph would repeat the routes of its capture") for routes in ROUTES),
    *((routes, FUSED_ROUTER, "its kernel can repeat no experts") for routes in ROUTES),
    *((routes, MTP, "routes of these layers have no place in the file") for routes in ROUTES),
    *((routes, OVERLAP, "its layers are not run chunk by chunk") for routes in ROUTES),
)


def _exclude(refused: _Feature, other: _Feature, reason: str) -> Rule:
    def rule(config: Config) -> Iterator[Problem]:
        if refused.is_on(config) and other.is_on(config):
            must = f"must be {show(refused.off)} with {other.named(config)}: {reason}"
            remedy = f"use {show(refused.off)}, or set {other.switch} to {show(other.off)}"
            if refused.instead:
                remedy += f", or {refused.instead}"
            yield Problem(refused.switch, attrgetter(refused.switch)(config), must, remedy)

    return rule


RULES: tuple[Rule, ...] = tuple(_exclude(*pair) for pair in PAIRS)
