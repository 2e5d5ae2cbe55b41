"""Readers of traces, for `profiling.trace`.

records.py           the checked reader of all of them: bounds, fields, errors
kineto.py            traces of torch's profiler
kineto_events.py     their events, and in which ranges of the program each lies
c10d.py              names, sizes, data types and splits of torch's collectives
"""
