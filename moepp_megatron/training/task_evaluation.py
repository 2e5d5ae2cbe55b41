"""Evaluates the running model on tasks of lm-eval, in the run's own layout.

Rank 0 alone has the tasks and lm-eval. It sends the tokens that lm-eval asks about to the other
ranks, and all of them score these together. Training goes on as if there had been no evaluation:
random numbers and buffers are put back, and routers count nothing outside of training.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule

from moepp_megatron.config import Config, Layout
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.model.stage import PipelineStage, evaluation_stages
from moepp_megatron.moe.router import MoEPPRouter
from moepp_megatron.runtime.patches import replaced
from moepp_megatron.training.checkpoint.agree import Agreement
from moepp_megatron.training.setup import TrainingModel
from moepp_megatron.training.step import unchanged
from moepp_megatron.training.token_scores import Sequences, score_sequences

# Rows are as long as the next of its doublings, so that few lengths occur.
_SHORTEST = 32


class TaskEvaluation:
    """The tasks of a run. Every rank has one and makes the same calls.

    Args:
        config: The run's configuration.
        model: The wrapped model.
        layout: The rank grid.
        tokenizer: The tokenizer's file.

    Raises:
        ConfigError: A task cannot be loaded; on rank 0.
    """

    def __init__(
        self, config: Config, model: TrainingModel, layout: Layout, tokenizer: Path
    ) -> None:
        self._config, self._model, self._layout = config, model, layout
        self._agreement = Agreement()
        self._tasks: Any = None
        if dist.get_rank() == 0:
            from moepp_megatron.training.lm_eval_tasks import load_tasks

            self._tokenizer = Tokenizer.load(tokenizer)
            with unchanged(model):
                self._tasks = load_tasks(config)

    def scores(self) -> dict[str, float]:
        """Evaluate the present model; scores by `TASK/METRIC` on every rank."""
        model = self._model
        with unchanged(model), model.gathered_parameters(), _without_limits(model.models):
            stages = evaluation_stages(model.models, self._config)
            try:
                found = self._lead(stages) if dist.get_rank() == 0 else self._follow(stages)
            finally:
                model.set_training(True)
        return found

    def _lead(self, stages: list[PipelineStage]) -> dict[str, float]:
        from moepp_megatron.training.lm_eval_tasks import run_tasks

        def score(rows: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
            return self._score(stages, rows)

        settings = self._config
        found: dict[str, float] | str
        try:
            found = run_tasks(
                self._tasks,
                score,
                self._tokenizer,
                settings.model.seq_length,
                settings.evaluation.limit,
            )
        except Exception as error:
            self._agreement.from_first(f"{type(error).__name__}: {error}")
            raise
        self._agreement.from_first(found)
        return found

    def _follow(self, stages: list[PipelineStage]) -> dict[str, float]:
        while isinstance(sent := self._agreement.from_first(None), Sequences):
            score_sequences(stages, sent)
        if isinstance(sent, str):
            raise RuntimeError(f"evaluation.tasks failed on rank 0: {sent}")
        found: dict[str, float] = sent
        return found

    def _score(
        self, stages: list[PipelineStage], rows: Sequence[Sequence[int]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Log-probabilities of each row's tokens after the first, and which are likeliest."""
        by_length: dict[int, list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            by_length[self._padded(len(row) - 1)].append(number)
        answers: list[Any] = [None] * len(rows)
        # The longest first: what does not fit into memory shows at once.
        for padded in sorted(by_length, reverse=True):
            numbers = by_length[padded]
            sequences = self._sequences([rows[number] for number in numbers], padded)
            self._agreement.from_first(sequences)
            scores = score_sequences(stages, sequences)
            assert scores is not None, "rank 0 has the scores"
            for place, number in enumerate(numbers):
                length = len(rows[number]) - 1
                answers[number] = (
                    scores["token_logprobs"][place, :length],
                    scores["is_likeliest"][place, :length],
                )
        return answers

    def _padded(self, length: int) -> int:
        """The shortest of a few lengths that the layout divides."""
        layout = self._layout
        padded = _SHORTEST * layout.tp * (2 * layout.cp if layout.cp > 1 else 1)
        while padded < length:
            padded *= 2
        return min(padded, self._config.model.seq_length)

    def _sequences(self, rows: Sequence[Sequence[int]], padded: int) -> Sequences:
        input_ids = np.zeros((len(rows), padded), dtype=np.int64)
        labels = np.zeros_like(input_ids)
        for place, row in enumerate(rows):
            input_ids[place, : len(row) - 1], labels[place, : len(row) - 1] = row[:-1], row[1:]
        # As many tokens at once as training has.
        most = self._config.training.micro_batch_size * self._config.model.seq_length // padded
        per_replica = -(-len(rows) // self._layout.dp)
        return Sequences(input_ids, padded, labels, max(1, min(most, per_replica)))


@contextmanager
def _without_limits(models: Sequence[MegatronModule]) -> Iterator[None]:
    """A context without capacity and without noise, as `inference_settings.FORWARD_ONLY`.

    With a limit, a token's logits would depend on which other tokens are there.
    """
    with ExitStack() as stack:
        for model in models:
            # Of megatron-core's own layer; MoE++ has its own limit, and noise in training alone.
            nothing = {"moe_expert_capacity_factor": None, "moe_input_jitter_eps": None}
            stack.enter_context(replaced(model.config, **nothing))
            for module in model.modules():
                if isinstance(module, MoEPPRouter):
                    unlimited = replace(module.moepp, capacity_factor=None)
                    stack.enter_context(replaced(module, moepp=unlimited))
        yield
