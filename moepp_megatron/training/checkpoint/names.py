"""The files of a checkpoint (`moepp_megatron/file_names.py`), and its name.

A checkpoint is a folder `step_NNNNNNNN` in megatron-core's distributed format, plus everything
that makes it usable by itself:

    __R_0.distcp     what rank R wrote
    .metadata        which bytes hold which tensor (torch.distributed.checkpoint)
    metadata.json    the format (megatron-core)
    config.yaml      resolved configuration
    tokenizer.json   copied from the run's data
    tokenizer_config.json  its end-of-document token, where the data name one
    chat_template.jinja  where the data are conversations: how messages become text
    state.json       progress, layout, versions, time
    integrity.json   SHA-256 and size of every other file (megatron-core's manifest)
"""

from __future__ import annotations

from pathlib import Path

from moepp_megatron.file_names import CONFIG_FILE, FORMAT_FILE, MANIFEST_FILE

PREFIX = "step_"


def checkpoint_name(step: int) -> str:
    """The folder name of the checkpoint after `step` steps."""
    return f"{PREFIX}{step:08d}"


def checkpoint_step(path: Path) -> int:
    """The number of steps in a checkpoint folder's name."""
    return int(path.name.removeprefix(PREFIX))


def is_checkpoint(path: Path) -> bool:
    """Whether `path` has the parts of a complete checkpoint; `damage` looks into them."""
    return all((path / name).is_file() for name in (FORMAT_FILE, CONFIG_FILE, MANIFEST_FILE))
