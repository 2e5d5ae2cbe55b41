"""Rules of the section `evaluation`."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem, show
from moepp_megatron.config.schema import Config


def _tasks_run_on_the_plain_model(config: Config) -> Iterator[Problem]:
    """Evaluation reads rows of other lengths, and must leave training as it was."""
    training, precision = config.training, config.precision
    needs = (
        (
            not training.cuda_graphs,
            f"training.cuda_graphs ({show(training.cuda_graphs)}) []: a graph has one length",
        ),
        (
            precision.fp8 is None,
            f"precision.fp8 ({precision.fp8}) null: Transformer Engine learns FP8's scales in "
            "evaluation too, and training would go on with others",
        ),
        (
            not config.parallel.overlap_moe_expert_parallel_comm,
            "parallel.overlap_moe_expert_parallel_comm (true) false: its schedule wants a loss",
        ),
    )
    for holds, need in needs:
        if config.evaluation.tasks and not holds:
            yield Problem(
                "evaluation.tasks",
                [str(path) for path in config.evaluation.tasks],
                f"must have {need}",
                "change that, or evaluate the exported model with lm_eval run",
            )


RULES = (_tasks_run_on_the_plain_model,)
