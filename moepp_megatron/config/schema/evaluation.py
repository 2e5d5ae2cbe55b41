"""Section `evaluation`: tasks of lm-eval that the model is evaluated on while it trains."""

from __future__ import annotations

from pydantic import Field

from moepp_megatron.config.schema.section import ConfigPath, Section, unit


class EvaluationSection(Section):
    """Tasks of lm-eval that the model is evaluated on while it trains. A task is code."""

    tasks: list[ConfigPath] = Field(
        default=[],
        description="YAML files of tasks, or folders of them (names that begin with _ are left "
        "out); their documents are local JSONL files",
        json_schema_extra=unit("-"),
    )
    interval: int = Field(
        default=0,
        ge=0,
        description="Steps between evaluations; 0 evaluates only at the end",
        json_schema_extra=unit("steps"),
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        description="Documents of each task, from its first; null takes all",
        json_schema_extra=unit("documents"),
    )
