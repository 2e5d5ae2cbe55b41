"""Sphinx's configuration of the documentation site, and its navigation.

`./launch/docs.sh` builds the site. Its sources are Markdown files where GitHub shows them, so the
source folder is the repository and a link leads to the same file in both.
"""

from __future__ import annotations

from pathlib import Path

from sphinx.application import Sphinx

import moepp_megatron
from moepp_megatron.version import __version__

# Imported before autodoc does it: that sets typing.TYPE_CHECKING, with which pydantic fails.
for _name in moepp_megatron.__all__:
    getattr(moepp_megatron, _name)

project = "moepp_megatron"
author = "the moepp_megatron maintainers"
version = release = __version__

# A page, or a shorter title and its page.
NAVIGATION = {
    "Start": [
        "README <README>",
        "docs/tutorials/first_run",
        "docs/tutorials/your_data",
        "docs/tutorials/slurm",
        "docs/tutorials/read_the_report",
        "docs/tutorials/upcycle_mixtral",
        "docs/tutorials/add_an_expert_kind",
        "Examples <examples/README>",
    ],
    "How to": [
        "Convert <docs/how_to/convert>",
        "Serve <docs/how_to/serve>",
        "Run in llama.cpp <docs/how_to/llama_cpp>",
        "Upcycle <docs/how_to/upcycle>",
        "Distill <docs/how_to/distill>",
        "Make a model cheaper <docs/how_to/thin>",
        "Fine-tune <docs/how_to/fine_tune>",
        "Evaluate <docs/how_to/evaluate>",
        "Replay routes <docs/how_to/replay_routes>",
        "Callbacks and plugins <docs/how_to/extend>",
        "Resume, stop, extend <docs/how_to/resume>",
        "Change the layout <docs/how_to/change_the_layout>",
        "Run in a container <docs/how_to/container>",
        "Come from Megatron-LM <docs/how_to/from_megatron_lm>",
        "Megatron-LM's arguments <docs/how_to/from_megatron_lm_flags>",
        "Come from Megatron-Bridge <docs/how_to/from_megatron_bridge>",
        "See which tokens skip the FFN <docs/inspect>",
    ],
    "Concepts": [
        "Router health <docs/routing>",
        "The budget of FFN experts <docs/budget>",
        "The routing guard <docs/guard>",
        "Parallel layouts <docs/parallelism>",
        "Optimizers and schedules <docs/optimizers>",
        "Fully sharded data parallelism <docs/fsdp>",
        "Precision and FP8 <docs/precision>",
        "What is supported <docs/limits>",
    ],
    "Runs and clusters": [
        "Data <docs/data>",
        "Checkpoints <docs/checkpoints>",
        "Checkpoints in object storage <docs/object_storage>",
        "Clusters <docs/cluster>",
        "Watch a run <docs/monitor>",
        "When it does not work <docs/troubleshooting>",
        "On a GPU <docs/gpu>",
        "Untrusted files <docs/untrusted>",
    ],
    "Speed and cost": [
        "Plan <docs/planning>",
        "Pilot <docs/pilot>",
        "Does it pay? <docs/evidence>",
        "Speed of the layer <docs/speed>",
        "Scaling tests <docs/scaling>",
        "Profiles <docs/profiling>",
    ],
    "Reference": [
        # Generated: benchmarks/pages.py.
        "docs/settings",
        "docs/commands",
        "docs/metrics",
        "Python API: moepp_megatron <docs/api/moepp_megatron>",
        "Python API: moe <docs/api/moe>",
        "Python API: config <docs/api/config>",
    ],
    "Project": [
        "docs/proven",
        "docs/compared",
        "CHANGELOG",
        "CONTRIBUTING",
        "SECURITY",
        "docs/upgrading",
        "docs/LOG",
    ],
}

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["docs/**", "*.md", "examples/README.md"]
# Not walked through.
exclude_patterns = [".*", "build", "data", "dist", "runs", "moepp_megatron", "tests"]
language = "en"
# `--nproc` keeps its hyphens.
smartquotes = False
# Headings are linked to as on GitHub: `budget.md#measured`.
myst_heading_anchors = 4

# Docstrings write code between single backticks.
default_role = "code"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
python_maximum_signature_line_length = 80

html_theme = "furo"
html_title = f"moepp_megatron {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
# The site's own index.html, which leads to the home page.
html_extra_path = ["_root"]
html_copy_source = False
html_search_scorer = str(Path(__file__).parent / "_static" / "search_scorer.js")


def _add_navigation(app: Sphinx, page: str, text: list[str]) -> None:
    """Append the navigation to the home page, whose source GitHub shows too."""
    if page == root_doc:
        for caption, pages in NAVIGATION.items():
            head = ["", "```{toctree}", f":caption: {caption}", ":hidden:", ":maxdepth: 1", ""]
            rooted = [each.replace("<", "</") if "<" in each else f"/{each}" for each in pages]
            text[0] += "\n".join([*head, *rooted, "```", ""])


def setup(app: Sphinx) -> None:
    """Connect what this file adds to Sphinx."""
    app.connect("source-read", _add_navigation)
