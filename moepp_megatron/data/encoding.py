"""Turns documents into token ids; the order does not depend on the number of processes."""

import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.config.errors import UnfitError
from moepp_megatron.data.documents import UNCUTTABLE, Piece, Skipped
from moepp_megatron.data.long_text import UncuttableError
from moepp_megatron.data.tokenizer import Tokenizer

# In flight per worker: enough to keep it busy while this process is, little enough for memory.
_BYTES_AHEAD = 16 * 1024 * 1024
_PIECES_AHEAD = 2


@dataclass(frozen=True)
class EncodedPiece:
    """The documents of one piece.

    Attributes:
        tokens: [n] uint16 or int32, the documents one after the other, each ending with EOD.
        lengths: [documents] int64, tokens of each document, EOD included.
        skipped: documents left out, by reason.
    """

    piece: Piece
    tokens: NDArray[np.generic]
    lengths: NDArray[np.int64]
    skipped: Counter[str]


_MOST_REASONS = 50


def count_skipped(skipped: Counter[str], more: Mapping[str, int]) -> None:
    """Add documents left out; a chat template may give each another reason."""
    for reason, count in more.items():
        is_known = reason in skipped or len(skipped) < _MOST_REASONS
        skipped[reason if is_known else "another reason"] += count


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """Return the smaller integer that holds every id, by the rule of megatron-core's `DType`."""
    # Repeated here because importing it imports torch, in every worker.
    return np.uint16 if vocab_size < 65500 else np.int32


def _encode_piece(piece: Piece, tokenizer: Tokenizer, text_key: str) -> EncodedPiece:
    """Read and tokenize one piece."""
    dtype = token_dtype(tokenizer.vocab_size)
    encoded: list[NDArray[np.generic]] = [np.empty(0, dtype)]
    lengths: list[int] = []
    skipped: Counter[str] = Counter()
    for document in piece.documents(text_key):
        if isinstance(document, Skipped):
            skipped[document.reason] += 1
            continue
        try:
            own: list[NDArray[np.generic]] = [
                np.array(ids, dtype) for ids in tokenizer.encode_in_pieces(document)
            ]
        except UncuttableError:
            skipped[UNCUTTABLE] += 1
            continue
        encoded += [*own, np.array([tokenizer.eod], dtype)]
        lengths.append(sum(map(len, own)) + 1)
    return EncodedPiece(
        piece=piece,
        tokens=np.concatenate(encoded),
        lengths=np.array(lengths, dtype=np.int64),
        skipped=skipped,
    )


def encode_pieces(
    pieces: Sequence[Piece],
    tokenizer_file: Path,
    eod_token: str,
    text_key: str,
    workers: int,
    meanwhile: Callable[[], object],
) -> Iterator[EncodedPiece]:
    """Tokenize all pieces, in their order; `meanwhile` is called once the workers have work."""
    workers = min(workers, len(pieces))
    if workers <= 1:
        meanwhile()
        tokenizer = Tokenizer.load(tokenizer_file, eod_token)
        yield from (_encode_piece(piece, tokenizer, text_key) for piece in pieces)
        return
    # Spawn, not fork: training the tokenizer has left threads in this process, and a forked
    # child can inherit a lock that one of them holds. A spawned one imports no torch either.
    executor = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer_file, eod_token, text_key),
    )
    try:
        yield from _in_order(executor, pieces, workers, meanwhile)
    finally:
        executor.shutdown(cancel_futures=True)


def _in_order(
    executor: ProcessPoolExecutor,
    pieces: Iterable[Piece],
    workers: int,
    meanwhile: Callable[[], object],
) -> Iterator[EncodedPiece]:
    remaining = deque(pieces)
    waiting: deque[tuple[Piece, Future[EncodedPiece]]] = deque()
    size_ahead = 0

    def refill() -> None:
        nonlocal size_ahead
        while remaining and (
            len(waiting) < _PIECES_AHEAD * workers or size_ahead < _BYTES_AHEAD * workers
        ):
            piece = remaining.popleft()
            waiting.append((piece, executor.submit(_work, piece)))
            size_ahead += piece.size

    refill()
    meanwhile()
    while waiting:
        piece, encoded = waiting.popleft()
        try:
            yield encoded.result()
        except BrokenProcessPool:
            raise UnfitError(
                f"a process that read {piece.parts[0].file.path} was ended from outside, most "
                "often for lack of memory; use fewer --workers"
            ) from None
        size_ahead -= piece.size
        refill()


_worker_state: tuple[Tokenizer, str] | None = None


def _start_worker(tokenizer_file: Path, eod_token: str, text_key: str) -> None:
    global _worker_state
    # The parent stops the workers; Ctrl-C would print a traceback from each of them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # One thread a worker: the processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_state = Tokenizer.load(tokenizer_file, eod_token), text_key


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    # The parent was killed; without this its workers would wait for work for ever.
    os._exit(1)


def _work(piece: Piece) -> EncodedPiece:
    assert _worker_state is not None, "_start_worker runs first in every worker"
    tokenizer, text_key = _worker_state
    return _encode_piece(piece, tokenizer, text_key)
