"""Sections `run`, `data` and `checkpoint`: where a run reads and writes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from moepp_megatron.config.plugins import Plugin
from moepp_megatron.config.schema.blend import BlendPart, DataStage
from moepp_megatron.config.schema.section import ConfigPath, Place, PlaceText, Section, Unit


class RunSection(Section):
    """Settings of a run's folder and name."""

    dir: Annotated[ConfigPath, Unit("-")]
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints, report"""
    name: Annotated[str, Unit("-"), Field(min_length=1)] = "moepp"
    """Name shown in reports and logs"""
    callbacks: Annotated[list[Annotated[str, Plugin("callbacks")]], Unit("-")] = []
    """Callbacks of installed packages that get the events of the run"""
    numa_binding: Annotated[bool, Unit("-")] = True
    """Keep each rank on the CPU cores of its GPU's NUMA node that it may use"""


class DataSection(Section):
    """The prepared corpus."""

    path: Annotated[ConfigPath | None, Unit("-")] = None
    """Folder written by `moepp data prepare`, or the prefix of Megatron's .bin and .idx; null where
    data.blend names several, or no data is read"""
    blend: Annotated[list[BlendPart], Unit("-")] = []
    """Folders that are trained on together, instead of data.path"""
    stages: Annotated[list[DataStage], Unit("-")] = []
    """Blends that replace the one before at a step or a number of tokens, in order"""
    validation: Annotated[dict[str, ConfigPath], Unit("-")] = {}
    """Further validation sets, {name: folder}, each with its own loss: the validation part of a
    folder that is trained on, all documents of any other"""
    cache: Annotated[ConfigPath | None, Unit("-")] = None
    """Folder for the order of samples, which all ranks must see; null: cache/ in the data folder"""
    tokenizer: Annotated[ConfigPath | None, Unit("-")] = None
    """Tokenizer file; null takes tokenizer.json in the (first) data folder"""
    dataset: Annotated[Literal["gpt"] | Annotated[str, Plugin("datasets")], Unit("-")] = "gpt"
    """Dataset that samples documents; gpt is megatron-core's, which shuffles documents and cuts
    them into sequences"""
    split: Annotated[str | None, Unit("1")] = None
    """Weights of the train, validation and test parts by documents, separated by commas; null takes
    the corpus's own (whole packages of the built-in one) or 98,2,0"""
    reset_attention_mask: Annotated[bool, Unit("-")] = False
    """Attention stays within documents; must be true for conversations (`moepp data prepare
    --chat`)"""
    reset_position_ids: Annotated[bool, Unit("-")] = False
    """Positions start at 0 in every document; changes metrics by position only, because rotary
    embeddings depend on distances"""
    eod_mask_loss: Annotated[bool, Unit("-")] = False
    """No loss where the input is the end-of-document token"""
    num_workers: Annotated[int, Unit("processes"), Field(ge=0)] = 0
    """Data loader processes per rank; 0 loads in the training process"""


class CheckpointSection(Section):
    """Settings of saving and loading checkpoints."""

    dir: Annotated[Place | None, Unit("-"), Field(min_length=1)] = None
    """Folder of the checkpoints, or s3://bucket/prefix or msc://profile/path; null means
    RUN/checkpoints"""
    staging: Annotated[ConfigPath | None, Unit("-")] = None
    """Where checkpoint.dir is an address: folder of this machine in which a rank's files are until
    they are uploaded; null means RUN/staging"""
    save_interval: Annotated[int, Unit("steps"), Field(ge=0)] = 0
    """Steps between checkpoints; 0 saves none on the way"""
    async_save: Annotated[bool, Unit("-")] = False
    """Write checkpoints in the background while training continues"""
    keep: Annotated[int | None, Unit("checkpoints"), Field(ge=1)] = None
    """Newest checkpoints to keep; null keeps all"""
    load: Annotated[PlaceText | None, Unit("-"), Field(min_length=1)] = None
    """Checkpoint folder, its address, or a run to start from, or auto for this run's newest"""
    load_optimizer: Annotated[bool, Unit("-")] = True
    """Go on where the checkpoint was; false takes its weights and starts at step 0"""

    def folder(self, run_dir: Path) -> str:
        """The folder that checkpoints are written to, or its address, for a run in `run_dir`."""
        return self.dir if self.dir is not None else str(run_dir / "checkpoints")

    def staging_folder(self, run_dir: Path) -> Path:
        """Where files of a checkpoint are until they are uploaded to object storage."""
        return self.staging or run_dir / "staging"
