"""Output that may hold untrusted text, and output that may lose its reader."""

import io
import os
import sys
from collections.abc import Buffer, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from moepp_megatron.runtime.disk import naming_stream
from moepp_megatron.runtime.printable import printable


class Console(rich.console.Console):
    """rich's console, except that text controls neither the terminal nor the console.

    rich takes a few control characters out of texts and lets the escape character through: the
    name of a run, a tensor or a file could clear the screen or set the clipboard. Square brackets
    are no markup: they could make links, and rich fails at an unopened closing tag.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Same as rich's; an OSError names the stream."""
        with naming_stream(self.stderr):
            super().print(*objects, **options)

    def print_line(self, text: str) -> None:
        """Print a line of plain text, however long."""
        self.print(text, highlight=False, soft_wrap=True)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Same as rich's, with control characters of the text written as escapes."""
        for segment in super().render(renderable, options):
            # Those with `control` are rich's own.
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let no write to stdout and stderr fail in the block.

    A training and its exit status depend on no reader, no disk and no terminal of its output: what
    cannot be written is dropped, from the first failure on. Streams without a file (a
    notebook's) are left alone.
    """
    stdout, stderr = _lasting(sys.stdout, 1), _lasting(sys.stderr, 2)
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            yield
        finally:
            for stream in (stdout, stderr):
                with suppress(AttributeError, OSError, ValueError):
                    stream.flush()


class _LastingFile(io.FileIO):
    def write(self, content: Buffer) -> int:
        """Write, or from the first failure on pretend to."""
        try:
            return super().write(content)
        except OSError:
            discard_output(self.fileno())
            return memoryview(content).nbytes


def _lasting(stream: Any, number: int) -> Any:
    """A stream like `stream` that does not fail, if that writes to the descriptor `number`."""
    try:
        stream.flush()
        if stream.fileno() != number:
            return stream
        options = {"encoding": stream.encoding, "errors": stream.errors}
    except (AttributeError, OSError, ValueError):
        return stream
    buffer = io.BufferedWriter(_LastingFile(number, "w", closefd=False))
    return io.TextIOWrapper(buffer, **options, line_buffering=True)


def discard_output(descriptor: int = 1) -> None:
    """Discard all further output of this process; 1 is stdout and 2 is stderr."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
