"""Where the communication time of a run goes, and how its speed scales.

collective.py        one collective operation, whatever recorded it
trace.py             what one rank recorded; load.py: all ranks, on one clock
kineto.py            traces of torch's profiler: kineto_events.py, kineto_sizes.py
groups.py            what a process group is for; purpose.py: what a collective serves
place.py             layer, part and pass in which it was called
lateness.py          waiting for late ranks, told from transfer
exposure.py          communication that nothing hides (intervals.py)
links.py             the link that a group's messages take, and its peak
expected_bytes.py    all-to-all bytes, measured against what routing makes necessary
expert_load.py       rows that the experts of each rank computed
analysis.py          all of it together (classes.py); document.py: as JSON; perfetto.py
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
step_summary.py      the summary of an analysed profile
changes.py           what changed between two profiles, by how much, and why
compare.py           the same in words
ceiling.py           bandwidth that `moepp bench collectives` has measured
scaling/             scaling tests: points, jobs, efficiency
"""
