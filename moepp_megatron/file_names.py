"""Names of the files that make up runs, checkpoints, prepared data and models of Hugging Face.

Code that writes or reads such a file takes its name from here, and results of commands never
replace one (`is_record`). The engine has no JSON name of its own elsewhere
(`tests/unit/test_file_names.py`).
"""

from __future__ import annotations

import re

# Of runs and checkpoints: the resolved configuration.
CONFIG_FILE = "config.yaml"
# Of runs.
METRICS_FILE = "metrics.jsonl"
# Records of steps that a rollback has undone.
UNDONE_FILE = "metrics.undone.jsonl"
ALERTS_FILE = "alerts.jsonl"
STATUS_FILE = "status.json"
# Of a run at W&B: its id there.
WANDB_ID_FILE = "wandb_id"
# Pages of commands about a run.
REPORT_PAGE, PROFILE_PAGE = "report.html", "profile.html"
# What marks a run's folder, and the folders in it.
RUN_FILES = (CONFIG_FILE, METRICS_FILE, STATUS_FILE, ALERTS_FILE)
RUN_FOLDERS = ("checkpoints", "tensorboard", "heartbeats", "hangs", "profile", "staging", "wandb")
# Of checkpoints; `training/checkpoint/files.py` says what they hold.
STATE_FILE = "state.json"
FORMAT_FILE = "metadata.json"
MANIFEST_FILE = "integrity.json"
TENSORS_FILE = ".metadata"
LATEST_FILE = "latest"
# Beside checkpoints outside of their run's folder: names that folder.
OWNER_FILE = "owner"
# Of checkpoints whose model came from Hugging Face: that model's config.json.
HF_CONFIG_FILE = "hf_config.json"
# Of checkpoints, prepared data and models of Hugging Face.
TOKENIZER_FILE = "tokenizer.json"
# Names special tokens.
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
# Of prepared data.
DATA_MANIFEST_FILE = "manifest.json"
# Of models of Hugging Face.
MODEL_CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
SAFETENSORS_INDEX_FILE = "model.safetensors.index.json"
PICKLES_INDEX_FILE = "pytorch_model.bin.index.json"
# Of data sets of Hugging Face.
DATASET_DICT_FILE = "dataset_dict.json"
DATASET_INFO_FILE = "dataset_info.json"
DATASET_STATE_FILE = "state.json"

_NAMES = frozenset(name for key, name in globals().items() if key.endswith("_FILE"))
# What each rank of a run writes: heartbeats, collectives, profiles.
_OF_RANK = re.compile(r".*rank_?\d+\..+")


def is_of_run(name: str) -> bool:
    """True if a run, or a command on it, writes a file or folder of this name."""
    others = (UNDONE_FILE, WANDB_ID_FILE, REPORT_PAGE, PROFILE_PAGE)
    # Damaged records are put beside (`observe.jsonl`).
    return name in (*RUN_FILES, *RUN_FOLDERS, *others) or name.startswith(f"{METRICS_FILE}.damaged")


def is_record(name: str) -> bool:
    """True if a file of this name belongs to a run, a checkpoint or a similar folder."""
    return name in _NAMES or _OF_RANK.fullmatch(name) is not None
