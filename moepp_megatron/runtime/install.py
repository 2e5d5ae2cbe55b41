"""The command that installs a missing package for the user who reads it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

TRANSFORMER_ENGINE = "launch/env.sh --te on a CUDA machine"
"""It is compiled against the installed torch."""


def how_to_install(*requirements: str) -> str:
    """A command for the Python that runs this; requirements as pip takes them (`wandb>=1`)."""
    from importlib import metadata

    # No registry has this package: where it is not installed, an extra is that of its folder.
    if not any(metadata.distributions(name="moepp-megatron")):
        folder = str(Path(__file__).parents[2])
        requirements = tuple(each.replace("moepp_megatron[", f"{folder}[") for each in requirements)
    return shlex.join([sys.executable, "-m", "pip", "install", *requirements])


OF_ALL = {
    "jinja2": "jinja2 (pages, Slurm scripts, chat templates)",
    "matplotlib": "matplotlib (plots of pages)",
    "numpy": "numpy (corpora, checkpoints)",
    "prometheus_client": "prometheus-client (metrics for Prometheus)",
    "psutil": "psutil (looks after processes)",
    "pyarrow": "pyarrow (parquet, Arrow and Zstandard files)",
    "pydantic": "pydantic (configurations)",
    "pynvml": "nvidia-ml-py (telemetry of GPUs)",
    "rich": "rich (tables on a terminal)",
    "tensorboard": "tensorboard (event files)",
    "tokenizers": "tokenizers (text to tokens and back)",
    "typer": "typer (the command line)",
    "yaml": "pyyaml (YAML files)",
}
"""The extra `all` of pyproject.toml: package and use, by the name that is imported."""


def missing(error: ModuleNotFoundError) -> str:
    """Describe a failed import in one line: package, its use, how to install it.

    Raises:
        ModuleNotFoundError: The error, if that is no package of the extra `all`.
    """
    package = OF_ALL.get((error.name or "").partition(".")[0])
    if package is None:
        raise error
    return f"{package} is not installed; {how_to_install('moepp_megatron[all]')}"
