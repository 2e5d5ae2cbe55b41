"""The folder of a run: what is in it, who may start there, what an earlier run leaves.

folder.py      `RunFolder`: its places, whether a start is let in, the claim, the configuration
holder.py      who holds it: locks, the beat of its process, the mark in a checkpoint folder
writable.py    refusing what cannot be written
move_aside.py  moving an earlier run out of the way of a new one
"""

from moepp_megatron.training.run_folder.folder import RunFolder, Start, checkpoint_folder
from moepp_megatron.training.run_folder.holder import refuse_running

__all__ = ["RunFolder", "Start", "checkpoint_folder", "refuse_running"]
