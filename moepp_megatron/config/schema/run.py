"""Sections `run`, `data` and `checkpoint`: where a run reads and writes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from moepp_megatron.config.plugins import Plugin
from moepp_megatron.config.schema.section import ConfigPath, PathText, Section, unit


class RunSection(Section):
    """Settings of a run's folder and name."""

    dir: ConfigPath = Field(
        description="Folder of the run: config.yaml, metrics.jsonl, checkpoints, report",
        json_schema_extra=unit("-"),
    )
    name: str = Field(
        default="moepp",
        min_length=1,
        description="Name shown in reports and logs",
        json_schema_extra=unit("-"),
    )
    callbacks: list[Annotated[str, Plugin("callbacks")]] = Field(
        default=[],
        description="Callbacks of installed packages that are told what the run does",
        json_schema_extra=unit("-"),
    )
    numa_binding: bool = Field(
        default=True,
        description="Keep each rank on the CPU cores of its GPU's NUMA node that it may use",
        json_schema_extra=unit("-"),
    )


class DataSection(Section):
    """The prepared corpus."""

    path: ConfigPath | None = Field(
        default=None,
        description="Folder written by `moepp data prepare`; null only where no data is read",
        json_schema_extra=unit("-"),
    )
    tokenizer: ConfigPath | None = Field(
        default=None,
        description="Tokenizer file; null takes tokenizer.json in data.path",
        json_schema_extra=unit("-"),
    )
    dataset: Literal["gpt"] | Annotated[str, Plugin("datasets")] = Field(
        default="gpt",
        description="What samples are made of the documents in data.path; gpt is megatron-core's "
        "dataset of shuffled documents, cut into sequences",
        json_schema_extra=unit("-"),
    )
    split: str | None = Field(
        default=None,
        description="Weights of the train, validation and test parts by documents, separated by "
        "commas; null takes the corpus's own (whole packages of the built-in one) or 98,2,0",
        json_schema_extra=unit("1"),
    )
    num_workers: int = Field(
        default=0,
        ge=0,
        description="Data loader processes per rank; 0 loads in the training process",
        json_schema_extra=unit("processes"),
    )


class CheckpointSection(Section):
    """Settings of saving and loading checkpoints."""

    dir: ConfigPath | None = Field(
        default=None,
        description="Folder of the checkpoints; null means RUN/checkpoints",
        json_schema_extra=unit("-"),
    )
    save_interval: int = Field(
        default=0,
        ge=0,
        description="Steps between checkpoints; 0 saves none on the way",
        json_schema_extra=unit("steps"),
    )
    async_save: bool = Field(
        default=False,
        description="Write checkpoints in the background while training goes on",
        json_schema_extra=unit("-"),
    )
    keep: int | None = Field(
        default=None,
        ge=1,
        description="Newest checkpoints to keep; null keeps all",
        json_schema_extra=unit("checkpoints"),
    )
    load: PathText | None = Field(
        default=None,
        min_length=1,
        description="Checkpoint folder or run to start from, or auto for this run's newest",
        json_schema_extra=unit("-"),
    )
    load_optimizer: bool = Field(
        default=True,
        description="Go on where the checkpoint was; false takes its weights and starts at step 0",
        json_schema_extra=unit("-"),
    )

    def folder(self, run_dir: Path) -> Path:
        """The folder that checkpoints are written to, for a run in `run_dir`."""
        return self.dir if self.dir is not None else run_dir / "checkpoints"
