"""Sphinx's configuration of the documentation site, and its navigation.

`./launch/docs.sh` builds the site.
"""

from __future__ import annotations

from sphinx.application import Sphinx

import moepp_megatron
from moepp_megatron.version import __version__

# Imported before autodoc does it: that sets typing.TYPE_CHECKING, with which pydantic fails.
for _name in moepp_megatron.__all__:
    getattr(moepp_megatron, _name)

project = "moepp_megatron"
author = "the moepp_megatron maintainers"
version = release = __version__

# The home page first; each group's pages in the order in which somebody needs them.
NAVIGATION = {
    "Start": [
        "tutorials/first_run",
        "tutorials/your_data",
        "tutorials/slurm",
        "tutorials/read_the_report",
        "tutorials/upcycle_mixtral",
        "tutorials/add_an_expert_kind",
    ],
    "How to": [
        "how_to/convert",
        "how_to/upcycle",
        "how_to/evaluate",
        "how_to/resume",
        "how_to/change_the_layout",
        "how_to/container",
        "how_to/from_megatron_lm",
        "how_to/from_megatron_lm_flags",
        "how_to/from_megatron_bridge",
    ],
    "Concepts": [
        "routing",
        "budget",
        "guard",
        "routing_shift",
        "parallelism",
        "precision",
    ],
    "Runs and clusters": [
        "data",
        "runs",
        "checkpoints",
        "cluster",
        "monitor",
        "gpu",
        "untrusted",
    ],
    "Models in and out": ["huggingface", "upcycling", "megatron_lm", "upgrading"],
    "Speed and cost": ["planning", "scaling", "profiling", "profiling_sources"],
    "Reference": [
        "settings",
        "commands",
        "metrics",
        "api/moepp_megatron",
        "api/moe",
        "api/config",
    ],
    "Project": [
        "proven",
        "project/changelog",
        "project/contributing",
        "project/security",
        "LOG",
    ],
}

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "index"
language = "en"
# `--nproc` keeps its hyphens.
smartquotes = False
# Headings are linked to as on GitHub: `budget.md#measured`.
myst_heading_anchors = 4

# Docstrings write code between single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
python_maximum_signature_line_length = 80

html_theme = "furo"
html_title = f"moepp_megatron {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False


def _add_navigation(app: Sphinx, page: str, text: list[str]) -> None:
    """Append the navigation to the home page, whose source GitHub shows too."""
    if page == root_doc:
        for caption, pages in NAVIGATION.items():
            head = ["", "```{toctree}", f":caption: {caption}", ":hidden:", ":maxdepth: 1"]
            text[0] += "\n".join([*head, *pages, "```", ""])


def setup(app: Sphinx) -> None:
    """Connect what this file adds to Sphinx."""
    app.connect("source-read", _add_navigation)
