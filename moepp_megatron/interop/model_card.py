"""The model card of an exported model: `README.md` with the front matter that the Hub reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.config.parameters import count_parameters
from moepp_megatron.data.tokenizer import read_tokenizer_config
from moepp_megatron.experts import CONSTANT, COPY, KINDS, ZERO
from moepp_megatron.file_names import (
    CHAT_TEMPLATE_FILE,
    METRICS_FILE,
    MODEL_CONFIG_FILE,
    TOKENIZER_FILE,
)
from moepp_megatron.interop.hf_source import read_json
from moepp_megatron.observe.metrics import MetricsError, StepMetrics, read_metrics
from moepp_megatron.training.checkpoint.files import Progress, read_record

UNKNOWN_LICENSE = "unknown"
# The run's configuration beside the exported weights.
TRAINING_CONFIG_FILE = "training_config.yaml"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")

_LLAMA_CPP = "llama.cpp (by moepp_megatron's `to_gguf.py`)"
_OWN_FILES = "transformers >= 5.8 and the Python files of this folder"
_PLAIN = f"transformers >= 5, or {_LLAMA_CPP}"
# What loads each `model_type`.
_READERS = {
    "moepp": _OWN_FILES,
    "MoE++": _OWN_FILES,
    "mixtral": _PLAIN,
    "qwen3_moe": _PLAIN,
    "deepseek": _LLAMA_CPP,
    "qwen3_moe_plus_plus": "transformers as changed in https://github.com/TsinghuaC3I/ZEDA",
}
_COMPUTE = {
    CONSTANT: "constant experts mix a token with a learned vector",
    COPY: "copy experts return it",
    ZERO: "zero experts return 0",
}


def check_license(license_id: str) -> None:
    """Refuse a text that is not an identifier of a licence; ConfigError if it is not one."""
    if not _LICENSE.fullmatch(license_id):
        raise ConfigError(
            f"--license ({license_id}) must be an identifier of the Hub in small letters, such as "
            "apache-2.0; name one, or leave it out"
        )


def model_card(folder: Path, export: Path, config: Config, command: str, license_id: str) -> str:
    """The text of the model card of a checkpoint, in a run's folder or by itself.

    `export` has the other files, and `command` made it; `license_id` is the Hub's, or `unknown`.
    """
    hf = read_json(export / MODEL_CONFIG_FILE)
    model_type, dtype = hf["model_type"], hf.get("dtype") or hf["torch_dtype"]
    is_trained = _progress(folder) is not None
    settings = f"the settings in `{TRAINING_CONFIG_FILE}`"
    made = f"Converted, not trained, by moepp_megatron with {settings}"
    if is_trained:
        made = f"Trained by moepp_megatron with {settings} (`moepp train {TRAINING_CONFIG_FILE}`)"
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
            "".join(_experts(config, model_type)),
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in _facts(folder, config, dtype)),
            "",
            *_loading(model_type, export),
            "",
            "## How it was made",
            "",
            f"{made}, and exported with:",
            "",
            "```bash",
            command,
            "```",
            "",
        ]
    )


def _experts(config: Config, model_type: str) -> Iterator[str]:
    yield "A language model whose routers choose among FFN experts"
    computed = [what for kind, what in _COMPUTE.items() if config.moe.count(kind)]
    if computed:
        yield " and experts that cost almost nothing (MoE++, arXiv 2410.07348): "
        yield ", ".join(computed)
    yield "."
    if computed and _LLAMA_CPP in _READERS[model_type]:
        yield " In this folder zero experts are FFN experts of zeros, which cost what those do."


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


def _loading(model_type: str, export: Path) -> Iterator[str]:
    reader = _READERS[model_type]
    has_code = reader is _OWN_FILES
    with_code, without = (f", trust_remote_code={has}" if has_code else "" for has in (True, False))
    has_tokenizer = (export / TOKENIZER_FILE).is_file()
    config = read_tokenizer_config(export)
    is_chat = (export / CHAT_TEMPLATE_FILE).is_file() or config.get("chat_template") is not None
    yield "## Use"
    yield ""
    yield f"It needs {reader}."
    if reader is _LLAMA_CPP:
        return
    yield ""
    yield "```python"
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    yield ""
    yield f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{with_code})'
    if has_tokenizer:
        yield f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{without})'
    if has_tokenizer and is_chat:
        yield 'messages = [{"role": "user", "content": "Hello"}]'
        yield "inputs = tokenizer.apply_chat_template("
        yield '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        yield ")"
        yield "output = model.generate(**inputs, max_new_tokens=64)"
        yield 'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))'
    yield "```"
    if has_code:
        yield ""
        yield (
            "vLLM serves it with `--model-impl transformers --trust-remote-code`, or, where "
            "moepp_megatron is installed, without these."
        )
        yield ""
        yield (
            "For fine-tuning, `output_router_logits=True` adds the balance loss (times "
            "`router_aux_loss_coef`) to the loss; without it routers may leave their balance."
        )
