"""Schema, loading and checks of the configuration; imports neither torch nor megatron.

blends.py         the folders that a run draws from, and from where on
checks.py         runs the cross-field rules and reports every broken one, each on its line
choices.py        comma-separated values of command-line options
errors.py         the two errors a user can cause
exit_codes.py     exit statuses of commands and ranks
flops.py          floating-point operations of training, counted from the configuration
from_megatron.py  turns a Megatron-LM command line into a configuration
hardware.py       rated numbers of a kind of GPU, and the limits of a healthy one
json_file.py      reads JSON that somebody else may have written: in bounds
layout.py         the rank grid
load.py           loads a checked Config from a YAML file
megatron_file.py  reads the arguments of a Megatron-LM run from its script or YAML
megatron_flags.py Megatron-LM's arguments and the settings
mistakes.py       unknown names and refused values, each with the remedy; names of earlier versions
parameters.py     exact parameter counts from the configuration, before any model is built
paths.py          refuses texts that cannot be a path of this machine
plugins.py        what a setting may name besides: entry points of installed packages
reference.py      every setting with type, default, unit, range and meaning, from the schema
regular_file.py   reads regular files that somebody else may have made, up to a limit
rows.py           rules as rows: what is wrong where, what must hold, what to write instead
sections.py       the sections by name, and what they declare of themselves
stages.py         which transformer layers each pipeline stage holds
vanilla.py        the vanilla model that a MoE++ configuration is compared with
world_size.py     rules that depend on the number of ranks
yaml_file.py      reads YAML: safe, bounded, no duplicate keys, and errors say where

Start with `load_config(path, overrides)`, which raises a `ConfigError` with one line per problem.
`check_world_size` adds the checks that depend on the number of ranks.
"""

from moepp_megatron.config.checks import check_config, check_world_size
from moepp_megatron.config.errors import ConfigError, UnfitError
from moepp_megatron.config.layout import Layout, RankCoordinates
from moepp_megatron.config.load import load_config, parse_config, with_overrides
from moepp_megatron.config.parameters import ParameterCounts, checkpoint_bytes, count_parameters
from moepp_megatron.config.schema import Config
from moepp_megatron.config.schema.data import DEFAULT_SPLIT, parse_split
from moepp_megatron.config.stages import stage_layers

__all__ = [
    "DEFAULT_SPLIT",
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
