"""Shows the progress of a measurement."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moepp_megatron.runtime.terminal import Console


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A function that prints the name of each of `total` measurements on stderr."""
    console = Console(stderr=True)
    done = iter(range(1, total + 1))
    yield lambda what: console.print(f"[{next(done)}/{total}] {what}")
