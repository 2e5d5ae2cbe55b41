"""The folder of a run: its contents, who may start there, remains of an earlier run.

folder.py      `RunFolder`: its paths, checks before a start, the claim, the configuration
move_aside.py  moving an earlier run out of the way of a new one
ownership.py   locks, heartbeat, the mark in a checkpoint folder; refusing unwritable folders
"""

from moepp_megatron.training.run_folder.folder import RunFolder, Start, checkpoint_folder
from moepp_megatron.training.run_folder.ownership import refuse_running

__all__ = ["RunFolder", "Start", "checkpoint_folder", "refuse_running"]
