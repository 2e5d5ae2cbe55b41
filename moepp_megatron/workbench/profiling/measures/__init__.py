"""Single measures of a recording; `profiling.analysis` puts them together.

exposure.py        communication that nothing hides (intervals.py)
lateness.py        waiting for late ranks, separated from transfer
classes.py         collectives of a kind, summed
purpose.py         where in the model a collective was called, and what it serves
expected_bytes.py  all-to-all bytes, measured against what routing makes necessary
expert_load.py     rows that the experts of each rank computed
slow_rank.py       a rank that computes longer than its rows explain
links.py           the link that a group's messages take, and its peak
intervals.py       arithmetic of time intervals: lists of (start, end), microseconds
"""
