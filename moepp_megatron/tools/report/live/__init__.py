"""Watches a run: its state, a table in the terminal, and numbers for Prometheus.

exported.py     the numbers that `moepp monitor --prometheus` serves: names and samples
liveness.py     whether a run continues, has ended, or is silent, judged from outside
history.py      the part of a run's records that the monitor keeps
prometheus.py   serves the newest numbers of runs to Prometheus, by default only on this machine
run.py          watches a run's folder: its configuration, records, alerts and whether it is alive
runs.py         watches all runs in folders, including those that come later
table.py        shows a run on a terminal until it has ended or the user stops
"""
