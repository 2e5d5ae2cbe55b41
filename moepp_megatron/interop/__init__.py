"""Checkpoints in and out: the released MoE++ format, upcycling, scoring, other zero-expert models.

All conversions stream: no function builds a model or holds more than a few tensors, except
`score`, which runs a model. `megatron_lm` and `megatron_arguments` put MoE++ into Megatron-LM's own
training loop.
"""
