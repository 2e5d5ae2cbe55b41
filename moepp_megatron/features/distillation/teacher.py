"""The teacher model, and its configuration in the run's layout. Imports no torch."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from moepp_megatron.config import Config, ConfigError, load_config, parse_config
from moepp_megatron.data.prepared_data import check_model_tokenizer
from moepp_megatron.file_names import CONFIG_FILE, MANIFEST_FILE, MODEL_CONFIG_FILE, TOKENIZER_FILE
from moepp_megatron.training.checkpoint.files import file_digest, plain_damage
from moepp_megatron.training.checkpoint.find import find_checkpoint

# Settings of the run that decide how a forward pass is spread over its ranks.
_LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "pipeline_model_parallel_layout",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
)
_DISPATCHER = ("dispatcher", "flex_backend", "flex_num_sms", "fused")


@dataclass(frozen=True)
class TeacherModel:
    """A checkpoint whose model teaches a run.

    `config` is of its model, in the layout, batch and format of the run, for forward passes.
    """

    checkpoint: Path
    config: Config

    @classmethod
    def of(cls, config: Config) -> "TeacherModel | None":
        """Return the teacher of a run, or None if it has none.

        Raise ConfigError if there is no such checkpoint, its tokens differ from the run's, or its
        model does not fit the run's layout.
        """
        name = config.distillation.teacher
        if name is None:
            return None
        checkpoint = _find(name, config)
        saved = load_config(checkpoint / CONFIG_FILE)
        if saved.model.vocab_size != config.model.vocab_size:
            raise ConfigError(
                f"distillation.teacher ({name}) must have model.vocab_size "
                f"({config.model.vocab_size}) tokens and has {saved.model.vocab_size}; name a "
                "teacher with the same tokenizer"
            )
        try:
            check_model_tokenizer(config, checkpoint / TOKENIZER_FILE)
            return cls(checkpoint, _in_layout(saved, config))
        except ConfigError as error:
            raise ConfigError(
                f"distillation.teacher ({name}) must fit this run, and: {error}"
            ) from None

    @property
    def identity(self) -> str:
        """SHA-256 of the checkpoint's manifest, which has the SHA-256 of each of its files."""
        return file_digest(self.checkpoint / MANIFEST_FILE)


def teacher_config(config: Config) -> Config | None:
    """The teacher's configuration, or None; refuses one as `TeacherModel.of` does."""
    teacher = TeacherModel.of(config)
    return None if teacher is None else teacher.config


def _find(name: str, config: Config) -> Path:
    folder = Path(name).expanduser()
    if (folder / MODEL_CONFIG_FILE).is_file() and not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            f"distillation.teacher ({name}) must be a checkpoint of ours, and is one of Hugging "
            f"Face; convert it once: moepp convert upcycle {shlex.quote(name)} TEACHER --zero 0 "
            "--copy 0 --constant 0, or moepp convert hf-to-mcore if it is a MoE++ model"
        )
    try:
        # Tensors are hashed when they are read, by all ranks together.
        return find_checkpoint(name, Path(os.path.abspath(config.run.dir)), plain_damage)
    except ConfigError:
        raise ConfigError(
            f"distillation.teacher ({name}) must be a checkpoint folder or a run that has a valid "
            "one; name another one, or null"
        ) from None


def _in_layout(saved: Config, config: Config) -> Config:
    """The teacher's model, with what a forward pass next to the run's model takes from the run."""
    shape = saved.model.model_dump(mode="json", exclude_unset=True)
    # Its multi-token prediction teaches nothing.
    shape.pop("mtp_num_layers", None)
    moe = saved.moe.model_dump(mode="json", exclude_unset=True)
    # What acts only in training, or makes a token's logits depend on the others in the batch.
    for key in ("budget", "bias_update_rate", "capacity_factor", "input_jitter_eps", "static_rows"):
        moe.pop(key, None)
    ours = config.moe.model_dump(mode="json", exclude_unset=True)
    moe |= {key: ours[key] for key in _DISPATCHER if key in ours}
    if saved.moe.is_vanilla:
        moe.pop("fused", None)
        if moe.get("dispatcher") == "alltoall_dedup":
            moe["dispatcher"] = "alltoall"
    parallel = config.parallel.model_dump(mode="json")
    layout = {key: parallel[key] for key in _LAYOUT}
    if saved.model.num_layers != config.model.num_layers:
        # It places the layers of another depth.
        layout["pipeline_model_parallel_layout"] = None
    training = config.training
    return parse_config(
        {
            "run": {"dir": str(config.run.dir)},
            "model": {**shape, "seq_length": config.model.seq_length},
            "moe": moe,
            "parallel": layout,
            "precision": {"dtype": config.precision.dtype},
            "optimizer": {"lr": config.optimizer.lr},
            "training": {
                "train_iters": 1,
                "global_batch_size": training.global_batch_size,
                "micro_batch_size": training.micro_batch_size,
                "deterministic": training.deterministic,
            },
        }
    )
