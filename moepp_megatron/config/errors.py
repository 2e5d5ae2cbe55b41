"""Errors a user can cause; each carries the exit code of the command it ends."""


class ConfigError(Exception):
    """A wrong configuration or usage: one line with name, value, rule and remedy."""

    exit_code = 2


class UnfitError(Exception):
    """This machine cannot do what was asked."""

    exit_code = 3
