"""Checkpoints in and out: the released MoE++ format, upcycling, scoring, other zero-expert models.

Everything there streams: no function builds a model or holds more than a few tensors, except
`score`, which runs one. `megatron_lm` and `megatron_arguments` put MoE++ into Megatron-LM's own
training loop.
"""
