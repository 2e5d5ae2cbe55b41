"""Scaling tests: step time and efficiency of MoE++ and vanilla over rank counts.

points.py      rank counts, layouts and batches: the points, each a trial
page.py        the records of scale.json, scaling.html, the table in the terminal
"""
