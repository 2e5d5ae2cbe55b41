"""What a run will cost before it is started: time, memory, traffic, money, and the best layout.

Read in this order: `workload.py` (what is trained), `grid.py` (how it is laid out), `parts.py`
(what every part of a layer computes and moves), `rates.py`, `links.py` and `efficiency.py` (how
fast that goes), `step.py` (a training step), `memory.py` (what a rank holds), `search.py` (all
layouts).
`published/` holds the model against results that others measured. No torch in this room.
"""
