"""Watches a run: its state, a table in the terminal, and numbers for Prometheus.

exported.py     the numbers that `moepp monitor --prometheus` serves: names and samples
prometheus.py   watches all runs in folders, and serves their newest numbers, by default only here
run.py          watches a run's folder: its records, alerts, and whether it continues or has ended
table.py        shows a run on a terminal until it has ended or the user stops
"""
