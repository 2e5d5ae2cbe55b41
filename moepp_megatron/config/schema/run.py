"""Sections `run`, `data` and `checkpoint`: where a run reads and writes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from moepp_megatron.config.plugins import Plugin
from moepp_megatron.config.schema.blend import BlendPart, DataStage
from moepp_megatron.config.schema.section import (
    ConfigPath,
    Place,
    PlaceText,
    Section,
    unit,
)


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
        description="Folder written by `moepp data prepare`, or the prefix of Megatron's .bin and "
        ".idx; null where data.blend names several, or no data is read",
        json_schema_extra=unit("-"),
    )
    blend: list[BlendPart] = Field(
        default_factory=list,
        description="Folders that are trained on together, instead of data.path",
        json_schema_extra=unit("-"),
    )
    stages: list[DataStage] = Field(
        default_factory=list,
        description="Blends that replace the one before at a step or a number of tokens, in order",
        json_schema_extra=unit("-"),
    )
    validation: dict[str, ConfigPath] = Field(
        default_factory=dict,
        description="Further validation sets, {name: folder}, each with its own loss: the "
        "validation part of a folder that is trained on, all documents of any other",
        json_schema_extra=unit("-"),
    )
    cache: ConfigPath | None = Field(
        default=None,
        description="Folder for the order of samples, which all ranks must see; null: cache/ in "
        "the data folder",
        json_schema_extra=unit("-"),
    )
    tokenizer: ConfigPath | None = Field(
        default=None,
        description="Tokenizer file; null takes tokenizer.json in the (first) data folder",
        json_schema_extra=unit("-"),
    )
    dataset: Literal["gpt"] | Annotated[str, Plugin("datasets")] = Field(
        default="gpt",
        description="How documents become samples; gpt is megatron-core's dataset, which shuffles "
        "documents and cuts them into sequences",
        json_schema_extra=unit("-"),
    )
    split: str | None = Field(
        default=None,
        description="Weights of the train, validation and test parts by documents, separated by "
        "commas; null takes the corpus's own (whole packages of the built-in one) or 98,2,0",
        json_schema_extra=unit("1"),
    )
    reset_attention_mask: bool = Field(
        default=False,
        description="Attention stays within documents; must be true for conversations "
        "(`moepp data prepare --chat`)",
        json_schema_extra=unit("-"),
    )
    reset_position_ids: bool = Field(
        default=False,
        description="Positions start at 0 in every document; changes metrics by position only, "
        "because rotary embeddings depend on distances",
        json_schema_extra=unit("-"),
    )
    eod_mask_loss: bool = Field(
        default=False,
        description="No loss where the input is the end-of-document token",
        json_schema_extra=unit("-"),
    )
    num_workers: int = Field(
        default=0,
        ge=0,
        description="Data loader processes per rank; 0 loads in the training process",
        json_schema_extra=unit("processes"),
    )


class CheckpointSection(Section):
    """Settings of saving and loading checkpoints."""

    dir: Place | None = Field(
        default=None,
        min_length=1,
        description="Folder of the checkpoints, or s3://bucket/prefix or msc://profile/path; null "
        "means RUN/checkpoints",
        json_schema_extra=unit("-"),
    )
    staging: ConfigPath | None = Field(
        default=None,
        description="Where checkpoint.dir is an address: folder of this machine in which a rank's "
        "files are until they are uploaded; null means RUN/staging",
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
    load: PlaceText | None = Field(
        default=None,
        min_length=1,
        description="Checkpoint folder, its address, or a run to start from, or auto for this "
        "run's newest",
        json_schema_extra=unit("-"),
    )
    load_optimizer: bool = Field(
        default=True,
        description="Go on where the checkpoint was; false takes its weights and starts at step 0",
        json_schema_extra=unit("-"),
    )

    def folder(self, run_dir: Path) -> str:
        """The folder that checkpoints are written to, or its address, for a run in `run_dir`."""
        return self.dir if self.dir is not None else str(run_dir / "checkpoints")
