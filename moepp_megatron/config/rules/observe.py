"""Rules of the section `observe`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.schema import Config

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _webhook_is_named_not_given(config: Config) -> Iterator[Problem]:
    """The address is a secret: it is read from the environment and never part of a message."""
    name = config.observe.webhook_url_env
    if name is not None and not _NAME.fullmatch(name):
        yield Problem(
            "observe.webhook_url_env",
            "...",
            "must be the name of an environment variable, not an address (not shown here)",
            "export MOEPP_WEBHOOK=ADDRESS and use MOEPP_WEBHOOK",
        )


RULES = (_webhook_is_named_not_given,)
