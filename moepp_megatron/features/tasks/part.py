"""Evaluates the running model on tasks of lm-eval, in the run's own layout.

Only rank 0 has the tasks and lm-eval. It sends the tokens that lm-eval asks about to the other
ranks, and all of them score these together. Training continues as if there had been no evaluation:
random numbers and buffers are put back, and routers count nothing outside of training. It also goes
on where a task fails that was tried before the run began, as by a perplexity beyond all numbers.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import batched
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule

from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.model.stage import PipelineStage, evaluation_stages
from moepp_megatron.moe.router import MoEPPRouter
from moepp_megatron.runtime.distributed import Agreement
from moepp_megatron.runtime.patches import replaced
from moepp_megatron.training.part import Fields, Part, PartContext, Step
from moepp_megatron.training.step import unchanged
from moepp_megatron.training.token_scores import Sequences, padded_length, score_sequences

logger = logging.getLogger(__name__)

# Of each rank at once: what is sent, and the time between two signs of progress, has a bound.
_MICRO_BATCHES = 64


class TasksPart(Part):
    """The tasks of a run; ConfigError, on rank 0, if one cannot be loaded.

    The run's supervisor is notified of progress, because evaluation may take hours.
    """

    def __init__(self, run: PartContext) -> None:
        self._run, self._config, self._model = run, run.config, run.model
        self._agreement = Agreement()
        self._stages: list[PipelineStage] = []
        self._is_scoring = False
        self._tasks: Any = None
        if dist.get_rank() == 0:
            from moepp_megatron.features.tasks.lm_eval_tasks import load_tasks

            self._tokenizer = Tokenizer.load(run.tokenizer)
            with unchanged(run.model):
                self._tasks = load_tasks(run.config)

    @staticmethod
    def is_wanted(run: PartContext) -> bool:
        """True with tasks."""
        return bool(run.config.evaluation.tasks)

    def wants_record(self, step: int) -> bool:
        """True if the tasks run after `step`."""
        return self._run.is_due(step, self._config.evaluation.interval, at_end=True)

    def record(self, step: Step, fields: Fields) -> Fields:
        """The scores; a collective."""
        return {"task_score": self.scores()} if self.wants_record(step.number) else {}

    def scores(self) -> dict[str, float] | None:
        """Return the model's scores by `TASK/METRIC` on every rank.

        None if lm-eval has failed, which is logged.
        """
        model = self._model
        with (
            self._run.supervisor.during("evaluation"),
            unchanged(model),
            model.gathered_parameters(),
            _without_limits(model.models),
        ):
            self._stages = evaluation_stages(model.models, self._config)
            try:
                return self._lead() if dist.get_rank() == 0 else self._follow()
            finally:
                model.set_training(True)

    def _lead(self) -> dict[str, float] | None:
        from moepp_megatron.features.tasks.lm_eval_tasks import run_tasks

        settings = self._config
        length, limit = settings.model.seq_length, settings.evaluation.limit
        scores: dict[str, float] | None = None
        try:
            scores = run_tasks(self._tasks, self._score, self._tokenizer, length, limit)
        except Exception:
            if self._is_scoring:
                # The model has failed, and other ranks may be in the middle of a collective.
                raise
            logger.exception("evaluation.tasks failed; training continues without these scores")
        self._agreement.from_first(scores)
        return scores

    def _follow(self) -> dict[str, float] | None:
        while isinstance(sent := self._agreement.from_first(None), Sequences):
            self._score_together(sent)
        scores: dict[str, float] | None = sent
        return scores

    def _score_together(self, sequences: Sequences) -> dict[str, np.ndarray] | None:
        with self._run.supervisor.during("evaluation"):
            return score_sequences(self._stages, sequences)

    def _score(self, rows: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Log-probabilities of the tokens after the first of each row, and which are likeliest."""
        by_length: dict[int, list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            padded = padded_length(len(row) - 1, self._run.layout, self._config.model.seq_length)
            by_length[padded].append(number)
        answers: list[Any] = [None] * len(rows)
        self._is_scoring = True
        # The longest first: what does not fit into memory shows at once.
        for padded in sorted(by_length, reverse=True):
            # As many tokens in a micro-batch as training has.
            training = self._config.training
            most = max(1, training.micro_batch_size * self._config.model.seq_length // padded)
            for numbers in batched(by_length[padded], most * self._run.layout.dp * _MICRO_BATCHES):
                sequences = self._sequences([rows[number] for number in numbers], padded, most)
                self._agreement.from_first(sequences)
                scores = self._score_together(sequences)
                assert scores is not None, "rank 0 has the scores"
                for place, number in enumerate(numbers):
                    length = len(rows[number]) - 1
                    answers[number] = (
                        scores["token_logprobs"][place, :length],
                        scores["is_likeliest"][place, :length],
                    )
        self._is_scoring = False
        return answers

    def _sequences(self, rows: Sequence[Sequence[int]], padded: int, most: int) -> Sequences:
        input_ids = np.zeros((len(rows), padded), dtype=np.int64)
        labels = np.zeros_like(input_ids)
        for place, row in enumerate(rows):
            input_ids[place, : len(row) - 1], labels[place, : len(row) - 1] = row[:-1], row[1:]
        per_replica = -(-len(rows) // self._run.layout.dp)
        return Sequences(input_ids, padded, labels, min(most, per_replica))


@contextmanager
def _without_limits(models: Sequence[MegatronModule]) -> Iterator[None]:
    """Disable capacity and noise in the block, as `inference_settings.FORWARD_ONLY`."""
    # With a limit, a token's logits would depend on which other tokens are there.
    with ExitStack() as stack:
        for model in models:
            # Of megatron-core's own layer; MoE++ has its own limit, and noise only in training.
            nothing = {"moe_expert_capacity_factor": None, "moe_input_jitter_eps": None}
            stack.enter_context(replaced(model.config, **nothing))
            for module in model.modules():
                if isinstance(module, MoEPPRouter):
                    unlimited = replace(module.moepp, capacity_factor=None)
                    stack.enter_context(replaced(module, moepp=unlimited))
        yield
