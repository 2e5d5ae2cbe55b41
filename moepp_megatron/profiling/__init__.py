"""Where the communication time of a run goes, and how its speed scales.

collective.py        one collective operation, whatever recorded it
records.py           fields and lines of files that other programs write
nccl_names.py        functions, data types and counts as NCCL tells them to profilers
communicators.py     global ranks from ranks within communicators
peer_transfers.py    all-to-alls from sends and receives
inspector.py         logs of NCCL Inspector
plugin_trace.py      traces of NCCL's example profiler plugin
flight_recorder.py   dumps of torch's flight recorder
merge.py             ranks brought onto one clock
sources.py           which format a file is in, and its collectives
summary.py           a profile in a few numbers, to compare
compare.py           what changed between two profiles, and why
"""
