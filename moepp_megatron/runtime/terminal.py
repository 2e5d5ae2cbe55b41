"""The consoles for all output that may hold untrusted text."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from moepp_megatron.config.printable import printable


class Console(rich.console.Console):
    """rich's console, except that text controls neither the terminal nor the console.

    rich takes a few control characters out of texts and lets the escape character through: the
    name of a run, a tensor or a file could clear the screen or set the clipboard. Square brackets
    are no markup: they could make links, and rich fails at a tag that ends what never began.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, **options)

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


class RunConsole(Console):
    """The console of a training, which goes on when nobody reads it any more."""

    def on_broken_pipe(self) -> None:
        """Print nothing from here on, where rich's ends the process."""
        self.quiet = True
        discard_output()


def discard_output(descriptor: int = 1) -> None:
    """Send what this process prints from here on nowhere; 1 is stdout and 2 is stderr."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
