"""The model card of an exported model: `README.md` with the front matter that the Hub reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.config.parameters import count_parameters
from moepp_megatron.experts import KINDS
from moepp_megatron.file_names import METRICS_FILE
from moepp_megatron.observe.metrics import MetricsError, StepMetrics, read_metrics
from moepp_megatron.training.checkpoint.progress import Progress, read_record

UNKNOWN_LICENSE = "unknown"
# The run's configuration beside the exported weights.
TRAINING_CONFIG_FILE = "training_config.yaml"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")

# What loads each layout, and with which argument.
_OWN_FILES = ("transformers >= 5.8 and the Python files of this folder", ", trust_remote_code=True")
_READERS = {
    "moepp": _OWN_FILES,
    "released": _OWN_FILES,
    "vanilla": ("transformers >= 5", ""),
    "zeda": ("transformers as changed in https://github.com/TsinghuaC3I/ZEDA", ""),
}


def check_license(license_id: str) -> None:
    """Refuse a text that is not an identifier of a licence; ConfigError if it is not one."""
    if not _LICENSE.fullmatch(license_id):
        raise ConfigError(
            f"--license ({license_id}) must be an identifier of the Hub in small letters, such as "
            "apache-2.0; name one, or leave it out"
        )


def model_card(
    folder: Path, config: Config, dtype: str, layout: str, command: str, license_id: str
) -> str:
    """The text of the model card of a checkpoint, in a run's folder or by itself.

    `dtype` and `layout` are of the export, `command` made it; `license_id` is the Hub's, or
    `unknown`.
    """
    name = " ".join((config.run.name or folder.name).split())
    return "\n".join(
        [
            "---",
            f"license: {license_id}",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags:",
            "- moe",
            "- moe++",
            "---",
            "",
            f"# {name}",
            "",
            "A language model with MoE++ layers (arXiv 2410.07348): next to FFN experts, their "
            "routers choose zero-computation experts, which cost no matrix product.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in _facts(folder, config, dtype)),
            "",
            *_loading(layout),
            "",
            "## How it was made",
            "",
            f"Trained by moepp_megatron with the settings in `{TRAINING_CONFIG_FILE}` "
            f"(`moepp train {TRAINING_CONFIG_FILE}`), and exported with:",
            "",
            "```bash",
            command,
            "```",
            "",
        ]
    )


def _facts(folder: Path, config: Config, dtype: str) -> Iterator[tuple[str, str]]:
    model, moe, counts = config.model, config.moe, count_parameters(config)
    moe_layers = sum(moe.moe_layer_pattern(model.num_layers))
    yield "layers", f"{model.num_layers}, {moe_layers} of them MoE layers"
    yield "hidden size", f"{model.hidden_size:,}"
    yield (
        "experts of a MoE layer",
        ", ".join(f"{moe.count(kind)} {kind.name}" for kind in KINDS)
        + f"; {moe.router_topk} per token",
    )
    yield "parameters", f"{counts.total:,}, of which a token meets {counts.active:,} on average"
    yield "tau", f"{moe.tau:g}"
    yield "phi (FFN share of selections under perfect balance)", f"{moe.ffn_share:.3f}"
    progress, record = _progress(folder), _record(folder)
    if record is not None and record.ffn_fraction is not None:
        yield f"FFN share measured at step {record.step:,}", f"{record.ffn_fraction:.3f}"
    if progress is not None:
        yield "trained on", f"{progress.tokens:,} tokens in {progress.step:,} steps"
    if record is not None and record.loss is not None:
        yield f"training loss at step {record.step:,}", f"{record.loss:.4f} nats per token"
    if record is not None and record.valid_loss is not None:
        yield f"validation loss at step {record.step:,}", f"{record.valid_loss:.4f} nats per token"
    yield "sequence length", f"{model.seq_length:,} tokens"
    yield "weights", dtype


def _progress(folder: Path) -> Progress | None:
    try:
        record = read_record(folder)
    except ValueError:
        return None
    return None if record is None else record.progress


def _record(folder: Path) -> StepMetrics | None:
    """The run's last record up to the checkpoint's step; None where the run is not around it."""
    progress = _progress(folder)
    if progress is None:
        return None
    try:
        records = read_metrics(folder.parent.parent / METRICS_FILE)
    except MetricsError:
        return None
    earlier = records[records.steps <= progress.step]
    return earlier[-1] if earlier else None


def _loading(layout: str) -> Iterator[str]:
    reader, argument = _READERS[layout]
    yield "## Use"
    yield ""
    yield f"It needs {reader}:"
    yield ""
    yield "```python"
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    yield ""
    yield f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{argument})'
    yield 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
    yield "```"
    if argument:
        yield ""
        yield (
            "For fine-tuning, `output_router_logits=True` adds the balance loss (times "
            "`router_aux_loss_coef`) to the loss; without it routers may leave their balance."
        )
