"""Section `evaluation`: tasks of lm-eval that the model is evaluated on while it trains."""

from typing import Annotated

from moepp_megatron.config.rows import no_effect_without
from moepp_megatron.config.schema.section import ConfigPath, Section, Unit


class EvaluationSection(Section):
    """Tasks of lm-eval that the model is evaluated on while it trains. A task is code."""

    tasks: list[ConfigPath] = []
    """YAML files of tasks, or folders of them (names that begin with _ are left out); their
    documents are local JSONL files"""
    interval: Annotated[int, Unit("steps", ge=0)] = 0
    """Steps between evaluations; 0 evaluates only at the end"""
    limit: Annotated[int | None, Unit("documents", ge=1)] = None
    """Documents of each task, from its first; null takes all"""

    excludes = (
        (
            "evaluation.tasks",
            "training.cuda_graphs",
            "a graph has one length, and tasks have rows of many",
        ),
        (
            "evaluation.tasks",
            "precision.fp8",
            "Transformer Engine learns FP8's scales in evaluation too, and changes training",
        ),
        (
            "evaluation.tasks",
            "parallel.overlap_moe_expert_parallel_comm",
            "its schedule wants a loss",
        ),
    )
    instead = "evaluate the exported model with lm_eval run"
    no_effect = (
        no_effect_without("evaluation.tasks", "evaluation.interval evaluation.limit", "name some"),
    )
