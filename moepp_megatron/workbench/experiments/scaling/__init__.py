"""Scaling tests: the points, the measurement at each, and the results.

grid.py       rank counts, layouts and batches: the points
point.py      what one point's job writes down
folder.py     the points on disk: finished, failed, of which settings
jobs.py       starts the job of each point
efficiency.py the records of scale.json
"""
