"""What an alert of a shift says has moved."""

from __future__ import annotations

import numpy as np

from moepp_megatron.observe.expert_usage import ExpertUsage
from moepp_megatron.observe.shift_reading import ShiftFinding, ShiftReading
from moepp_megatron.training.shift_text import (
    ShiftStory,
    moved_classes,
    moved_experts,
    with_sources,
    with_tokens,
)

NAMES = ["FFN 0", "FFN 1", "zero 0"]


def finding(surprise: list[list[float]]) -> ShiftFinding:
    """Two layers of three experts; the second layer's first expert has doubled."""
    before = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    after = np.array([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]])
    reading = ShiftReading(1.5, 1.2, "data")
    return ShiftFinding(reading, 3, 1e5, before, after, np.array(surprise), 2.0, 2.75)


def test_experts_are_named_by_how_unusual_their_change_is() -> None:
    found = finding([[0.5, -1.9, 0.0], [6.0, -3.0, 0.1]])
    assert moved_experts(found, NAMES, [2, 4]) == [
        "layer 4 FFN 0 10.0% -> 20.0%",
        "layer 4 FFN 1 60.0% -> 50.0%",
    ]
    assert moved_experts(finding([[1.0] * 3] * 2), NAMES, [2, 4]) == [], "all of it is usual"
    story = ShiftStory.of(found, ["layer 4 FFN 0 10.0% -> 20.0%"])
    assert story.text(57) == (
        "the data: loss and routing, or token ids; since step 55; loss 2.00 -> 2.75, "
        "layer 4 FFN 0 10.0% -> 20.0%"
    )


def test_other_token_ids_are_the_data_whatever_has_moved() -> None:
    alone = with_tokens(None, 12, 0.034)
    assert alone == ShiftStory("data", 12, None, ["3.4% of the tokens in other groups of ids"])
    loss = ShiftStory("optimizer", 3, 1e5, ["loss 2.00 -> 2.75"])
    both = with_tokens(loss, 2, 0.034)
    assert (both.cause, both.steps, both.chance) == ("data", 3, 1e5)
    assert both.moved == ["loss 2.00 -> 2.75", "3.4% of the tokens in other groups of ids"]


def test_data_sources_are_named_whatever_else_has_moved() -> None:
    line = "source code: loss 3.00 -> 5.10"
    alone = with_sources(None, 4, [line])
    assert alone == ShiftStory("source", 4, None, [line])
    assert alone.text(20) == f"data of one source: its loss; since step 17; {line}"
    tokens = with_sources(with_tokens(None, 12, 0.034), 4, [line])
    assert (tokens.cause, tokens.steps) == ("data", 12)
    assert tokens.moved == ["3.4% of the tokens in other groups of ids", line]
    assert tokens.of_metric("token_shift") == tokens
    assert tokens.of_metric("source_shift").cause == "source"


def profile(rarest_ffn: int) -> ExpertUsage:
    """A layer whose tokens make two selections each, in two positions of four classes."""
    cells = np.array([[[150, 100], [150, 100], [150, 100], [rarest_ffn, 100]] * 2])
    ffn = int(cells[0, :, 0].sum())
    return ExpertUsage(np.array([[ffn - 100, 100, 1600 - ffn]]), cells)


def test_classes_of_tokens_are_named_by_their_frequency() -> None:
    assert moved_classes([profile(150)] * 2, profile(40), [3]) == [
        "layer 3 rarest tokens 1.50 -> 0.40 FFN experts"
    ]
    assert moved_classes([profile(150)], profile(148), [3]) == []
    without = [ExpertUsage(each.experts, each.cells[:, :0]) for each in (profile(150), profile(40))]
    assert moved_classes(without[:1], without[1], [3]) == []
