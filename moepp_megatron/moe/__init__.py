"""The MoE++ layer for megatron-core: router, zero-computation experts, dispatcher, lane, spec.

Nothing here knows about training, files or the command line, so any Megatron loop can use it.
"""
