"""MoE++ (arXiv 2410.07348) trained inside NVIDIA megatron-core."""

__version__ = "0.1.0"
