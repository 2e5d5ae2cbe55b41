"""Checkpoints of a run: contents, writing and reading.

files.py         names, progress and record, damage: all that reads bytes only
plain_pickle.py  reads pickles as plain values: the index of the tensors, the state of FP8
data_only.py     makes megatron-core and torch read one as data, never code
find.py          finds the checkpoint that a name means, and the newest valid one
compatible.py    compares a configuration with the one that a checkpoint was written with
optimizer.py     state of optimizers: their steps, a rank's shard in terms of whole parameters
state.py         model, optimizer, schedule as megatron-core's sharded state
background.py    a forked process that writes, a thread that uploads, while training continues
save.py          one save: planned, written by all ranks, published
retention.py     deletes old checkpoints, and what killed runs left; checks the space of future ones
write.py         `CheckpointWriter`: the saves of a run, on which all ranks agree
read.py          all of a load

`find.py`, `compatible.py` and `files.py` import no torch, so that the command line answers at once.
"""
