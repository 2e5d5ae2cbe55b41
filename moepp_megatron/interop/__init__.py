"""Checkpoints in and out: the released MoE++ format, upcycling, scoring, other zero-expert models.

Everything here streams: no function builds a model or holds more than a few tensors, except
`score`, which runs one.
"""
