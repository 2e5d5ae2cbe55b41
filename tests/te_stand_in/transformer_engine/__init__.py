"""A stand-in of Transformer Engine for machines without a GPU: signatures, and plain arithmetic.

Every class and function that megatron-core's layers call has the signature of Transformer Engine
2.20, so a call with an argument that does not exist fails as it would there. GEMMs are torch's on
values rounded to FP8 and back, with one scale a tensor whatever the recipe: what is quantised, how
many rows, in which context can be seen (`pytorch.record.CALLS`); numerics are for a GPU. Checks
that Transformer Engine makes are made: sizes of FP8 GEMMs, permutations of no rows, pickled state.
"""

# ruff: noqa: F401
from transformer_engine import common, pytorch

__version__ = "2.20.0"
