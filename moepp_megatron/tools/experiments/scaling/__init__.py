"""Scaling tests: the points, the measurement at each, and the results.

grid.py        rank counts, layouts and batches: the points
trials.py      the points as trials
measure.py     what the ranks of one point do
records.py     what they write down, and the records of scale.json
plots.py       the records over rank counts
page.py        scaling.html, and its tables in the terminal
"""
