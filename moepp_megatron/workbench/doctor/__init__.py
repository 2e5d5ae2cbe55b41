"""Whether a node can be trusted with a run: findings, each with severity and remedy.

Checks are functions from what was read to findings; reading happens in `runtime/nvml.py` (cards),
`system.py` (the node), `packages.py` and `speed.py`. `examine.py` puts them together.
"""
