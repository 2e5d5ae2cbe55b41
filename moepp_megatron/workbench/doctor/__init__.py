"""Examines whether a node is fit for a run; each finding has a severity and a remedy.

Checks are functions from what was read to findings; reading happens in `runtime/nvml.py` (GPUs),
`system.py` (the node), `packages.py` and `speed.py`. `examine.py` puts them together.
"""
