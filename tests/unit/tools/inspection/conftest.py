"""A text and what an invented model did with it, without any model."""

import numpy as np
import pytest

from moepp_megatron.data.token_classes import token_classes
from moepp_megatron.data.tokenizer import train_tokenizer
from moepp_megatron.experts import ExpertCounts
from moepp_megatron.tools.inspection.findings import Trace
from moepp_megatron.tools.inspection.request import InspectedModel, InspectRequest
from moepp_megatron.tools.inspection.text import TokenizedText

SOURCE = '''import re


def first_words(text, count=12):
    """The first words of a text, don't you know."""
    for word in re.findall(r"[a-z]+", text):
        if len(word) > 3 and count != 0:
            count -= 1  # counts down to 0
            yield word.lower()
    return None
'''
EXPERTS = ExpertCounts(4, num_constant_experts=1, num_copy_experts=1, num_zero_experts=1)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([SOURCE] * 4, 330)


@pytest.fixture(scope="session")
def text(tokenizer):
    return TokenizedText.of(tokenizer, SOURCE, "words.py", 10_000)


def model(experts, layers):
    """A model by its experts and the numbers of its MoE layers."""
    return InspectedModel("invented, step 1", ("3 MoE layers",), experts, layers, 0.5, None)  # type: ignore[arg-type]


def invented_trace(count, seed=1, layers=3, window=64):
    """Random selections of two experts and random losses."""
    rng = np.random.default_rng(seed)
    selected = np.argsort(rng.random((layers, count, EXPERTS.num_experts)), axis=2)[:, :, :2]
    gates = np.sort(rng.random((layers, count, 2)), axis=2)[:, :, ::-1] * 0.8
    losses = rng.gamma(2.0, 1.5, count)
    losses[::window] = np.nan
    return Trace(model(EXPERTS, tuple(range(1, layers + 1))), selected, gates, losses)


def request_of(text, out, **changes):
    """A page of the text, without models of its own."""
    classes = token_classes(text.text, text.spans.tolist(), "python")
    values = {
        "text": text,
        "language": "python",
        "classes": classes,
        "window": 64,
        "model": None,
        "out": out,
        "notices": ["the text is read in windows of 64"],
    }
    return InspectRequest(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def make_request(text, tmp_path):
    return lambda **changes: request_of(**{"text": text, "out": tmp_path / "page.html"} | changes)
