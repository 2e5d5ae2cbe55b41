"""Scaling tests: the points, the measurement at each, and the results.

grid.py        rank counts, layouts and batches: the points
runs.py        the points as a set of runs: finished, failed, of which settings
measure.py     what the ranks of one point do
point.py       what they write down
efficiency.py  the records of scale.json
table.py       the records in the terminal
plots.py       the records over rank counts
page.py        scaling.html
"""
