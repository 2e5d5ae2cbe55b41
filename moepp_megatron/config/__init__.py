"""Schema, loading and checks of the configuration; imports neither torch nor megatron."""

from moepp_megatron.config.errors import ConfigError, UnfitError
from moepp_megatron.config.schema import Config

__all__ = ["Config", "ConfigError", "UnfitError"]
