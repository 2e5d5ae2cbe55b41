"""The page of `moepp inspect`."""

import html
import re

from moepp_megatron.data.token_classes import token_classes
from moepp_megatron.tools.inspection.text import TokenizedText
from moepp_megatron.tools.report.inspection import write_inspection
from tests.unit.tools.inspection.conftest import invented_trace

_SPAN = re.compile(r'<span style="--strength:([0-9.]+)" title="([^"]*)">(.*?)</span>', re.DOTALL)


def shown(page):
    """Strength, path and characters of each piece of the coloured text."""
    return [(float(s), html.unescape(p), html.unescape(t)) for s, p, t in _SPAN.findall(page)]


def test_every_token_has_its_colour_and_path(make_request, text):
    request, trace = make_request(), invented_trace(len(text))
    assert write_inspection(request, trace) == [("page", request.out)]
    page = request.out.read_text(encoding="ascii")
    assert not re.search(r"""(src|href)=["'](?!#)|<script""", page)
    assert f"<h1>{text.name}</h1>" in page
    pieces = shown(page)
    assert "".join(piece for _, _, piece in pieces) == text.text
    tokens = [piece for piece in pieces if piece[1]]
    assert len(tokens) == len(text)
    for at in (5, 17):
        strength, path, _ = tokens[at]
        assert abs(strength - trace.ffn[:, at].mean() / 2) < 0.006
        first, *layers = path.splitlines()
        assert first.endswith(f"loss {trace.losses[at]:.2f}")
        for row, line in enumerate(layers):
            ways = zip(trace.selected[row, at], trace.gates[row, at], strict=True)
            names = trace.model.experts.names
            named = ", ".join(f"{names[expert]} {gate:.3f}" for expert, gate in ways)
            assert line == f"layer {row + 1}: {named}"
    write_inspection(request, trace)
    assert request.out.read_text() == page


def test_text_cannot_break_out(make_request, tokenizer):
    evil = "</span><script>alert('1')</script> <b>&amp; \u2028 caf\u00e9 \"> " * 3
    own = TokenizedText.of(tokenizer, evil, "<i>&", 1000)
    classes = token_classes(own.text, own.spans.tolist(), "text")
    request = make_request(text=own, language="text", classes=classes)
    write_inspection(request, invented_trace(len(own)))
    page = request.out.read_text(encoding="ascii")
    assert "<script" not in page
    assert "".join(piece for _, _, piece in shown(page)) == evil
    assert "<i>&" not in page
    assert "&lt;i&gt;&amp;" in page
