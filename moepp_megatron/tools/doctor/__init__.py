"""Examines whether a node is fit for a run; each finding has a severity and a remedy.

card_checks.py   checks of each GPU: chip, memory, power, load and links
examine.py       the examination of this machine, or of all nodes of a launched job together
finding.py       what a check says, findings as a table, and what GPUs are measured by
folders.py       checks of the folders that a run writes to: writable, large enough, fast enough
gpu_checks.py    checks of a node's GPUs together
packages.py      checks of the software: Python, torch, megatron-core, NCCL, and what is optional
speed.py         short measurements, judged: a matrix product per device, collectives of ranks
system.py        checks of the node around the GPUs: shared memory, limits, network ports

Checks are functions from what was read to findings; reading happens in `runtime/nvml.py` (GPUs),
`system.py` (the node), `packages.py` and `speed.py`. `examine.py` puts them together.
"""
