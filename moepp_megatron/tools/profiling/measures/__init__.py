"""Measures of a recording's traces, each in a file.

exposure.py        communication that no computation hides
lateness.py        waiting for late ranks
purpose.py         what a collective serves
classes.py         sums by kind of collective
expected_bytes.py  all-to-all bytes against the routing
expert_load.py     rows of FFN experts by rank, and a rank that these do not explain
"""
