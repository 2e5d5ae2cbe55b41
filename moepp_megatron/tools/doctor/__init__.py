"""Examines whether a node is fit for a run; each finding has a severity and a remedy.

card_checks.py   checks of one GPU's chip, memory, power and load; None means nothing to say
examine.py       the examination of a node, and of all nodes of a launched job together
finding.py       what a check says, and what GPUs are measured by
folders.py       checks of the folders that a run writes to: writable, large enough, fast enough
gpu_checks.py    checks of a node's GPUs together
link_checks.py   checks of one GPU's links: PCIe and NVLink; None means nothing to say
packages.py      checks of the software: Python, torch, megatron-core, NCCL, and what is optional
session.py       runs an examination: alone on this machine, or as one of several launched ranks
speed.py         short measurements: a matrix product per device, and collectives between ranks
speed_checks.py  judges measured speeds of devices, ranks and links; measures nothing itself
system.py        checks of the node around the GPUs: shared memory, limits, clock, network ports
table.py         prints findings as a table

Checks are functions from what was read to findings; reading happens in `runtime/nvml.py` (GPUs),
`system.py` (the node), `packages.py` and `speed.py`. `examine.py` puts them together.
"""
