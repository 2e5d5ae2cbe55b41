"""Readers of other programs' files, for `profiling.trace` and `profiling.collective`.

records.py           the checked reader of all of them: bounds, fields, errors
kineto.py            traces of torch's profiler
kineto_events.py     their events, and in which ranges of the program each lies
c10d.py              names, sizes, data types and splits of torch's collectives
sources.py           recordings of collectives only: which format, and what is in it
flight_recorder.py   dumps of torch's flight recorder
inspector.py         logs of NCCL Inspector
communicators.py     global ranks from ranks within communicators
peer_transfers.py    all-to-alls from sends and receives
"""
