"""Scores tokens or a text, for `moepp score` and for callers from Python.

A request is checked before anything heavy is imported.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moepp_megatron.config import Config, ConfigError, Layout, load_config, with_overrides
from moepp_megatron.config.load import parse_override
from moepp_megatron.config.regular_file import read_text
from moepp_megatron.data.npz import read_arrays
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.file_names import CONFIG_FILE, TOKENIZER_FILE
from moepp_megatron.runtime.atomic import whole_file
from moepp_megatron.runtime.optional import quiet
from moepp_megatron.runtime.rank import RankEnvironment
from moepp_megatron.runtime.rank_environment import prepare_rank
from moepp_megatron.training.checkpoint.find import find_checkpoint
from moepp_megatron.training.inference_settings import FORWARD_ONLY, inference_override

if TYPE_CHECKING:
    from moepp_megatron.model.stage import PipelineStage

logger = logging.getLogger(__name__)


def text_of(path: Path, limit: int | None = None) -> tuple[str, bool]:
    """A file's characters, at most `limit` of them, and whether there are more.

    ConfigError if it cannot be read, is not UTF-8 or is empty.
    """
    # newline="": the model reads carriage returns too.
    text = read_text(path, "--text", None if limit is None else limit + 1, newline="")
    if not text:
        raise ConfigError(f"--text ({path}) must hold some text, and is empty; name another file")
    return text[:limit], limit is not None and len(text) > limit


def checkpoint_tokenizer(folder: Path, config: Config) -> Tokenizer:
    """The checkpoint's tokenizer; ConfigError without one, or with more tokens than the model."""
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise ConfigError(
            f"checkpoint ({folder}) must hold {TOKENIZER_FILE} to turn text into tokens, and the "
            "model it was converted from had none; copy the model's tokenizer.json there"
        )
    tokenizer = Tokenizer.load(file)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"{file} ({tokenizer.vocab_size} tokens) must not have more than "
            f"model.vocab_size ({config.model.vocab_size}) of the checkpoint; put the tokenizer "
            "there that the model was trained with"
        )
    return tokenizer


@dataclass(frozen=True)
class _TextWindows:
    """A text of N tokens as sequences [b, s] int64, filled up with end-of-document tokens."""

    # The text is read as one document: the end of the document before comes first, so that every
    # token of the text is predicted once. Each window begins with the last token of the one before
    # and has no context further back.

    input_ids: np.ndarray
    num_tokens: int
    num_bytes: int  # of the text in UTF-8

    @classmethod
    def read(cls, path: Path, tokenizer: Tokenizer, length: int) -> "_TextWindows":
        """Cut a file's text into windows of at most `length` tokens; ConfigError if it has none."""
        text, _ = text_of(path)
        ids = np.array([tokenizer.eod, *tokenizer.encode(text)], dtype=np.int64)
        count = len(ids) - 1
        if count == 0:
            raise ConfigError(f"--text ({path}) has no token; name another file")
        step = min(length, len(ids)) - 1
        if step < 1:
            raise ConfigError(
                f"model.seq_length ({length}) must be at least 2 to predict a token from another"
            )
        rows = -(-count // step)
        padded = np.full(rows * step + 1, tokenizer.eod, dtype=np.int64)
        padded[: len(ids)] = ids
        starts = step * np.arange(rows)[:, None]
        return cls(padded[starts + np.arange(step + 1)], count, len(text.encode()))

    def of_tokens(self, windows: np.ndarray) -> np.ndarray:
        """[N] values of the text's tokens, from [b, s - 1] of the windows."""
        return windows.reshape(-1)[: self.num_tokens]

    def lines(self, token_logprobs: np.ndarray) -> Iterator[str]:
        """The result in words, from [N] float64 natural logarithms."""
        rows, width = self.input_ids.shape
        loss = -float(token_logprobs.mean())
        bits = loss * self.num_tokens / self.num_bytes / math.log(2)
        yield f"text         {self.num_tokens:,} tokens in {rows:,} windows of at most {width:,}"
        yield f"loss         {loss:.4f} nats per token, {bits:.4f} bits per byte"
        # Beyond the range of a float it says nothing either.
        yield f"perplexity   {math.exp(min(loss, 700.0)):,.4g}"


@dataclass(frozen=True)
class ScoreRequest:
    """A checked request.

    Attributes:
        config: The checkpoint's, in the wanted layout; one sequence per micro-batch, the global
            batch holds all sequences (and fillers), `model.seq_length` is the padded length.
        input_ids: [b, s] int64.
        out: File to write, or None.
    """

    checkpoint: Path
    config: Config
    layout: Layout
    input_ids: np.ndarray
    out: Path | None = None
    logits: bool = False
    notices: list[str] = field(default_factory=list)
    text: _TextWindows | None = None

    @classmethod
    def read(
        cls,
        checkpoint: Path,
        tokens: Path | np.ndarray | None,
        out: Path | None,
        overrides: Sequence[str],
        world_size: int,
        logits: bool,
        text: Path | None = None,
    ) -> "ScoreRequest":
        """Check a request for tokens (an npz file or an array) or for a text file (ConfigError)."""
        _check_options(tokens, text, out, logits)
        source = f"--tokens ({tokens})" if isinstance(tokens, Path) else "tokens"
        input_ids = _read_input_ids(tokens) if isinstance(tokens, Path) else tokens
        if input_ids is not None:
            input_ids = _checked(input_ids, source)
        for override in overrides:
            inference_override(override)
        if out is not None and out.is_dir():
            raise ConfigError(f"--out ({out}) must be a file to write, and is a folder; name one")
        folder = find_checkpoint(checkpoint)
        trained = load_config(folder / CONFIG_FILE)
        windows = None
        if text is not None:
            tokenizer = checkpoint_tokenizer(folder, trained)
            windows = _TextWindows.read(text, tokenizer, trained.model.seq_length)
            input_ids = windows.input_ids
        assert input_ids is not None, "one of the two was given"
        size = trained.model.vocab_size
        wrong = input_ids[(input_ids < 0) | (input_ids >= size)]
        if wrong.size:
            raise ConfigError(
                f"{source}: input_ids ({wrong[0]}) must be between 0 and {size - 1}, the "
                "model's vocabulary; use the tokenizer that the model was trained with"
            )
        request = cls.of(folder, trained, input_ids, overrides, world_size)
        return replace(request, out=out, logits=logits, text=windows)

    @classmethod
    def of(
        cls,
        folder: Path,
        trained: Config,
        input_ids: np.ndarray,
        overrides: Sequence[str],
        world_size: int,
    ) -> "ScoreRequest":
        """A request for [b, s] int64 tokens that fit the model `trained`.

        `overrides` are settings that `inference_override` has passed. ConfigError if the layout
        does not fit the model or the ranks.
        """
        config = _scoring_config(trained, overrides, input_ids, world_size)
        layout = Layout.from_config(config, world_size)
        notices = list(_notices(trained, input_ids, config))
        return cls(folder, config, layout, input_ids, notices=notices)

    @contextmanager
    def stages(self) -> Iterator["list[PipelineStage]"]:
        """Be this process's rank in the block, which gets its part of the model."""
        rank = prepare_rank(self.config)
        from moepp_megatron.interop.scoring import scoring_stages
        from moepp_megatron.runtime import distributed

        with distributed.initialized(rank):
            distributed.build_groups(self.config, self.layout)
            yield scoring_stages(self)

    def run(self) -> dict[str, np.ndarray] | None:
        """Be this process's rank; returns, and writes, the same as `score`."""
        with self.stages() as stages:
            from moepp_megatron.interop.scoring import score_stages

            scores = score_stages(self, stages)
        if scores is None:
            return None
        if self.text is not None:
            values = {"token_ids": self.input_ids[:, 1:], **scores}
            scores = {name: self.text.of_tokens(value) for name, value in values.items()}
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.out) as temporary, temporary.open("wb") as stream:
                np.savez(stream, **scores)  # type: ignore[arg-type]
        return scores


def _check_options(
    tokens: Path | np.ndarray | None, text: Path | None, out: Path | None, logits: bool
) -> None:
    if (tokens is None) == (text is None):
        given = "neither" if tokens is None else "both"
        raise ConfigError(f"one of --tokens and --text ({given}) must be given; give just one")
    if isinstance(tokens, Path) and out is None:
        raise ConfigError("--out (absent) must name the file to write with --tokens; add it")
    if text is not None and logits:
        raise ConfigError("--logits must not be given with --text; leave it out, or use --tokens")


def _read_input_ids(tokens: str | Path) -> np.ndarray:
    """The array `input_ids` of an npz file; ConfigError if the file is none, or lacks it."""
    try:
        return read_arrays(Path(tokens), "input_ids")["input_ids"]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--tokens ({tokens}) must be an npz file with the array input_ids: {error}; write it "
            "with numpy.savez(FILE, input_ids=...)"
        ) from None


def _checked(input_ids: np.ndarray, source: str) -> np.ndarray:
    """The tokens as [b, s] int64, if they are such."""
    if input_ids.ndim != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 2:
        raise ConfigError(
            f"{source}: input_ids {list(input_ids.shape)} must be [sequences, tokens] "
            "with at least 1 sequence of 2 tokens; change its shape"
        )
    if not np.issubdtype(input_ids.dtype, np.integer):
        raise ConfigError(
            f"{source}: input_ids ({input_ids.dtype}) must be whole numbers; write it as int64"
        )
    return input_ids.astype(np.int64)


def _scoring_config(
    trained: Config, overrides: Sequence[str], input_ids: np.ndarray, world_size: int
) -> Config:
    """The checkpoint's configuration in the wanted layout; the batch holds all sequences."""
    sequences, length = input_ids.shape
    padded = divisible(length, overrides)
    shape = [f"model.seq_length={padded}", "training.global_batch_size=1"]
    config = with_overrides(trained, [*FORWARD_ONLY, *overrides, *shape])
    parallel = config.parallel
    stages = parallel.pipeline_model_parallel_size
    model_ranks = parallel.tensor_model_parallel_size * stages * parallel.context_parallel_size
    data_parallel = max(1, world_size // model_ranks)
    # The interleaved schedule takes micro-batches in groups of one per pipeline rank.
    per_rank = _round_up(-(-sequences // data_parallel), stages)
    return with_overrides(config, [f"training.global_batch_size={per_rank * data_parallel}"])


def divisible(length: int, overrides: Sequence[str]) -> int:
    """At least `length` tokens, which the layout of `overrides` cuts into equal pieces."""
    degrees = {"tensor_model_parallel_size": 1, "context_parallel_size": 1}
    for override in overrides:
        _, key, value = parse_override(override)
        # Values that are no degree of parallelism are refused with the configuration.
        if key in degrees and isinstance(value, int) and value > 0:
            degrees[key] = value
    tensor, context = degrees.values()
    return _round_up(length, tensor * (2 * context if context > 1 else 1))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _notices(trained: Config, input_ids: np.ndarray, config: Config) -> Iterator[str]:
    length, padded = input_ids.shape[1], config.model.seq_length
    if padded != length:
        yield (
            f"sequences of {length} tokens are padded to {padded}, which this layout divides; the "
            "fillers come last and are not written"
        )
    if length > trained.model.seq_length:
        yield (
            f"sequences of {length} tokens are longer than those that the model was made for "
            f"({trained.model.seq_length})"
        )
    if trained.moe.capacity_factor is not None:
        yield "moe.capacity_factor is ignored: no selection is dropped"
    if trained.precision.fp8 is not None:
        yield f"precision.fp8 is ignored: the model computes in {trained.precision.dtype}"


def score(
    checkpoint: str | Path,
    *overrides: str,
    tokens: str | Path | np.ndarray | None = None,
    text: str | Path | None = None,
    out: str | Path | None = None,
    logits: bool = False,
) -> dict[str, np.ndarray] | None:
    """Score given tokens, or a text, with a checkpoint's model, as `moepp score` does.

    Computes in this process; in a script that torchrun or srun has started, every rank calls it,
    and `overrides` may lay the model out over the ranks.

    Args:
        checkpoint: A checkpoint folder or a run.
        overrides: Settings `parallel.key=value` or `precision.key=value`.
        tokens: Whole numbers [b, s], or an npz file with them as `input_ids`.
        text: A UTF-8 text file instead, cut into windows (`_TextWindows`).
        out: File to write the result to.
        logits: Whether logits are wanted; not of a text.

    Returns:
        On rank 0, None elsewhere: `token_logprobs` [b, s-1] float64, natural logarithms, and where
        wanted `logits` [b, s, vocab] fp32. Of a text with N tokens `token_ids` [N] int64 and
        `token_logprobs` [N] float64.

    Raises:
        ConfigError: Whatever is wrong with the request.
    """
    quiet()
    given = tokens if tokens is None or isinstance(tokens, np.ndarray) else _read_input_ids(tokens)
    places = [None if path is None else Path(path) for path in (out, text)]
    world_size = RankEnvironment.read().world_size
    request = ScoreRequest.read(
        Path(checkpoint), given, places[0], overrides, world_size, logits, places[1]
    )
    for notice in request.notices:
        logger.warning("%s", notice)
    return request.run()
