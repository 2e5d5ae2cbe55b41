"""The files of a release agree on the version."""

from pathlib import Path

import yaml

from moepp_megatron.version import __version__

ROOT = Path(__file__).parents[2]


def test_citation_names_the_version_and_the_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (__version__, "Apache-2.0")


def test_changelog_has_the_version():
    assert f"\n## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
