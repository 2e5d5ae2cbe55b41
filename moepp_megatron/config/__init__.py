"""Schema, loading and checks of the configuration; imports neither torch nor megatron.

Start with `load_config(path, overrides)`, which raises a `ConfigError` with one line per problem.
`check_world_size` adds the checks that depend on the number of ranks.
"""

from moepp_megatron.config.checks import check_config, check_world_size
from moepp_megatron.config.errors import ConfigError, UnfitError
from moepp_megatron.config.layout import Layout, RankCoordinates
from moepp_megatron.config.load import load_config, parse_config, with_overrides
from moepp_megatron.config.parameters import (
    ParameterCounts,
    checkpoint_bytes,
    count_parameters,
)
from moepp_megatron.config.schema import Config
from moepp_megatron.config.split import parse_split
from moepp_megatron.config.stages import stage_layers

__all__ = [
    "Config",
    "ConfigError",
    "Layout",
    "ParameterCounts",
    "RankCoordinates",
    "UnfitError",
    "check_config",
    "checkpoint_bytes",
    "check_world_size",
    "count_parameters",
    "load_config",
    "parse_config",
    "parse_split",
    "stage_layers",
    "with_overrides",
]
