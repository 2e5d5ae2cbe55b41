"""Progress in a log: lines that say something new."""

import io

from rich.console import Console

from moepp_megatron.data.progress import track


def test_the_end_is_said_once() -> None:
    """Also where the last files are empty, or have grown while they were read."""
    log = io.StringIO()
    with track(Console(file=log), "encode", 2_000_000) as advance:
        for size in (1_000_000, 1_000_000, 0, 0, 500_000):
            advance(size)
    (line,) = log.getvalue().splitlines()
    assert line.startswith("encode: 2.0 of 2.0 MB, ")
