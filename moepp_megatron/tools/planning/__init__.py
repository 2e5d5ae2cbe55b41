"""Estimates a run's cost before it starts: time, memory, traffic, money; finds the best layout.

Read in this order: `workload.py` (what is trained), `grid.py` (how it is laid out), `parts.py`
(what every part of a layer computes and moves), `rates.py`, `traffic.py` and `machine.py` (how fast
that goes), `step.py` (a training step), `memory.py` (what a rank holds), `search.py` (all layouts
and the cost of each), `plan.py` (the best, and baselines).
`measured/` holds the model to runs that others measured, or you. Nothing here uses torch.
"""
