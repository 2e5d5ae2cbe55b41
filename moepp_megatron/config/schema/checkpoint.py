"""Section `checkpoint`: when checkpoints are saved, where, and what a run starts from."""

from pathlib import Path
from typing import Annotated

from moepp_megatron.config.paths import is_address
from moepp_megatron.config.rows import no_effect_where, no_effect_with, refuse
from moepp_megatron.config.schema.section import ConfigPath, Place, PlaceText, Section, Unit


class CheckpointSection(Section):
    """Settings of saving and loading checkpoints."""

    dir: Place | None = None
    """Folder of the checkpoints, or s3://bucket/prefix or msc://profile/path; null means
    RUN/checkpoints"""
    staging: ConfigPath | None = None
    """Where checkpoint.dir is an address: folder of this machine in which a rank's files are until
    they are uploaded; null means RUN/staging"""
    save_interval: Annotated[int, Unit("steps", ge=0)] = 0
    """Steps between checkpoints; 0 saves none on the way"""
    async_save: bool = False
    """Write checkpoints in the background while training continues"""
    keep: Annotated[int | None, Unit("checkpoints", ge=1)] = None
    """Newest checkpoints to keep; null keeps all"""
    load: PlaceText | None = None
    """Checkpoint folder, its address, or a run to start from, or auto for this run's newest"""
    load_optimizer: bool = True
    """Go on where the checkpoint was; false takes its weights and starts at step 0"""

    def folder(self, run_dir: Path) -> str:
        """The folder that checkpoints are written to, or its address, for a run in `run_dir`."""
        return self.dir if self.dir is not None else str(run_dir / "checkpoints")

    def staging_folder(self, run_dir: Path) -> Path:
        """Where files of a checkpoint are until they are uploaded to object storage."""
        return self.staging or run_dir / "staging"

    megatron_flags = (
        "save=dir save-interval async-save:true no-load-optim=load_optimizer:false "
        "finetune=load_optimizer:false"
    )
    own_rules = (
        refuse(
            "checkpoint.async_save",
            "checkpoint.async_save and not checkpoint.save_interval",
            "must have checkpoint.save_interval (0) above 0",
            "set checkpoint.save_interval to a number of steps, or checkpoint.async_save to false",
        ),
    )
    no_effect = (
        no_effect_with(
            "checkpoint.save_interval", 0, "checkpoint.keep", "set checkpoint.save_interval above 0"
        ),
        no_effect_where(
            lambda c: not is_address(c.checkpoint.dir or ""),
            "where checkpoint.dir is a folder",
            "checkpoint.staging",
            "set checkpoint.dir to an address such as s3://bucket/prefix, or leave it out",
        ),
        no_effect_with("checkpoint.load", None, "checkpoint.load_optimizer", "set checkpoint.load"),
    )
