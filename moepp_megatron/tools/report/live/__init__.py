"""Watches a run: its state, a table in the terminal, and numbers for Prometheus.

prometheus.py   serves the newest numbers of all runs in folders to Prometheus, by default only here
run.py          watches a run's folder: its records, alerts, and whether it continues or has ended
table.py        shows a run on a terminal until it has ended or the user stops
"""
