"""Commands that a reader copies from the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("width", [420, 500, 900, 1280])
def test_a_command_breaks_between_its_words_alone(
    browser: Any, whole_page: Path, width: int
) -> None:
    """`--nproc` with its end on the next line is copied as two words."""
    context = browser.new_context(viewport={"width": width, "height": 900})
    tab = context.new_page()
    tab.goto(whole_page.as_uri())
    lines = tab.evaluate(
        """() => [...document.querySelectorAll(".shell code")].map((code) => [code.textContent,
             [...code.querySelectorAll("span")].map((word) => {
               const range = document.createRange();
               range.selectNodeContents(word);
               const tops = [...range.getClientRects()].map((box) => Math.round(box.top));
               return [word.textContent, new Set(tops).size];
             })])"""
    )
    context.close()
    texts = [text for text, _ in lines]
    assert any(text.startswith("moepp train ") and "--nproc 8" in text for text in texts)
    for text, words in lines:
        assert " ".join(word for word, _ in words) == text
        for word, rows in words:
            # Only a path longer than a whole line has to break.
            assert rows == 1 or len(word) > 30, word
