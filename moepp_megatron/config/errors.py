"""The two errors a user can cause; the command line turns each into one line and an exit code."""

from __future__ import annotations

from moepp_megatron.config.exit_codes import REFUSED, UNFIT


class ConfigError(ValueError):
    """The configuration or the usage is wrong.

    The message has one line per problem, each with name, value, rule and remedy. The command line
    prints it without a traceback and exits with `exit_code`.
    """

    exit_code = REFUSED


class UnfitError(RuntimeError):
    """The configuration is valid, but this machine cannot run it (no GPU, missing package)."""

    exit_code = UNFIT
