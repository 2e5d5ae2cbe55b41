"""What all pages share: a table of contents that the headings make."""

from moepp_megatron.tools.report.blocks import _with_contents

_PAGE = "<header></header>\n<h2>One &amp; two</h2>\n<h2>Three</h2>\n"


def test_contents_link_to_each_heading():
    page = _with_contents(_PAGE + "<h2>Four</h2>")
    links = "".join(
        f'<li><a href="#{name}">{title}</a></li>'
        for name, title in (("one-two", "One &amp; two"), ("three", "Three"), ("four", "Four"))
    )
    assert page.startswith(
        f'<header></header>\n<nav aria-label="Contents"><ul class="contents">{links}<'
    )
    assert '<h2 id="one-two">One &amp; two</h2>' in page


def test_a_page_of_two_sections_needs_none():
    assert _with_contents(_PAGE) == _PAGE
