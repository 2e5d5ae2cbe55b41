"""docs/settings.md says what the schema says."""

from __future__ import annotations

from benchmarks import settings


def test_the_page_is_that_of_the_schema() -> None:
    assert settings.FILE.read_text(encoding="utf-8") == settings.page(), (
        "write it anew: python -m benchmarks.settings"
    )


def test_units_ranges_and_choices_are_on_it() -> None:
    page = settings.page()
    assert "| `tau` | `0.75` | 1 | > 0, <= 10 | Weight of zero-computation experts" in page
    assert "| `interval_s` | `1.0` | s | >= 0 | Time between samples" in page
    assert "| `qk_layernorm_scope` | `'head'` | - | head, all_heads |" in page
    assert "## routing_guard.rules[]\n" in page
