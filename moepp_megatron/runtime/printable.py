"""Makes untrusted text safe for a terminal."""

import logging
import re

# What moves the cursor or sets titles, colours and clipboards: C0 and C1 controls.
_CONTROLS = r"\x00-\x1f\x7f-\x9f"
# What reverses the order of reading, and line separators.
_ORDER = r"\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
# Halves of surrogate pairs, which no stream can encode.
_UNSAFE = re.compile(rf"[{_CONTROLS}{_ORDER}\ud800-\udfff]")


def printable(text: str, keep: str = "\n\t") -> str:
    r"""`text` with every character that a terminal would obey written as an escape, as \x1b.

    Args:
        text: Any text.
        keep: Characters that are left as they are.
    """
    return _UNSAFE.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), text)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class _PrintableRecord(logging.LogRecord):
    """A record whose message cannot command a terminal."""

    def getMessage(self) -> str:  # noqa: N802 (logging's name)
        """The message with its arguments, control characters as escapes."""
        return printable(super().getMessage())


def make_logs_printable() -> None:
    """Have every later log message escaped, whichever library logs it and whatever shows it."""
    logging.setLogRecordFactory(_PrintableRecord)
