"""The files of a release agree on the version."""

import yaml

from moepp_megatron.version import __version__
from tests import ROOT


def test_citation_names_the_version_and_the_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (__version__, "Apache-2.0")


def test_changelog_has_the_version():
    assert f"\n## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
