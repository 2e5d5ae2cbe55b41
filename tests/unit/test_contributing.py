"""CONTRIBUTING's table of changes names files that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_path_of_the_table_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("## To change X, touch Y")[1].split("## Words")[0]
    paths = re.findall(r"`([\w./-]+/[\w.]*|\w+\.(?:py|txt|toml))`", table)
    assert len(paths) > 40
    missing = [
        p for p in paths if not any((top / p).exists() for top in (ROOT, ROOT / "moepp_megatron"))
    ]
    assert missing == []
    pages = re.findall(r"docs/[\w/]+\.md", table)
    assert [page for page in pages if not (ROOT / page).is_file()] == []
