"""Readers of other programs' files, for `profiling.trace` and `profiling.collective`.

sources.py           which format a file is in, and its collectives
records.py           fields and lines of such files
kineto.py            traces of torch's profiler
kineto_events.py     their events, and in which ranges of the program each lies
kineto_sizes.py      sizes, data types and splits of their collectives
inspector.py         logs of NCCL Inspector
flight_recorder.py   dumps of torch's flight recorder
nccl_names.py        functions and counts as NCCL tells them to profilers
communicators.py     global ranks from ranks within communicators
peer_transfers.py    all-to-alls from sends and receives
"""
