"""Escapes control characters in log messages, which may quote untrusted files."""

from __future__ import annotations

import logging

from moepp_megatron.config.printable import printable


class _Record(logging.LogRecord):
    """A record whose message cannot command a terminal."""

    def getMessage(self) -> str:  # noqa: N802 (logging's name)
        """The message with its arguments, control characters as escapes."""
        return printable(super().getMessage())


def make_logs_printable() -> None:
    """Escape every later log message, whichever library logs it and whatever shows it."""
    logging.setLogRecordFactory(_Record)
