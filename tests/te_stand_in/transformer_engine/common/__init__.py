# ruff: noqa: F401
from transformer_engine.common import recipe
