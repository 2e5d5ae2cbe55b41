"""Settings of callbacks in the section `run`."""

from typing import Annotated

from moepp_megatron.config.plugins import Plugin
from moepp_megatron.config.schema.section import Section


class CallbackSettings(Section):
    """Callbacks of installed packages."""

    callbacks: list[Annotated[str, Plugin("callbacks")]] = []
    """Callbacks of installed packages that get the events of the run"""
