"""Rules of the section `observe`."""

from __future__ import annotations

import re

from moepp_megatron.config.rows import Rule, refuse
from moepp_megatron.config.schema import Config


def _is_no_name(config: Config) -> bool:
    name = config.observe.webhook_url_env
    return name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)


RULES: tuple[Rule, ...] = (
    # The address is a secret: it is read from the environment and never part of a message.
    refuse(
        "observe.webhook_url_env",
        _is_no_name,
        "must be the name of an environment variable, not an address (not shown here)",
        "export MOEPP_WEBHOOK=ADDRESS and use MOEPP_WEBHOOK",
        value=lambda c: "...",
    ),
)
