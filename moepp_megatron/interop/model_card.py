"""The model card of an exported model: `README.md` with the front matter that the Hub reads."""

from collections.abc import Iterator
from pathlib import Path

from moepp_megatron.config import Config
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
from moepp_megatron.observe.metrics import MetricsError, read_metrics
from moepp_megatron.training.checkpoint.files import Progress, SavedRecord

UNKNOWN_LICENSE = "unknown"
# The run's configuration beside the exported weights.
TRAINING_CONFIG_FILE = "training_config.yaml"

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


def model_card(folder: Path, export: Path, config: Config, command: str, license_id: str) -> str:
    """The text of the model card of a checkpoint, in a run's folder or by itself.

    `export` has the other files, and `command` made it; `license_id` is the Hub's, or `unknown`.
    """
    hf = read_json(export / MODEL_CONFIG_FILE)
    model_type, dtype = hf["model_type"], hf.get("dtype") or hf["torch_dtype"]
    progress = _progress(folder)
    settings = f"the settings in `{TRAINING_CONFIG_FILE}`"
    made = f"Converted, not trained, by moepp_megatron with {settings}"
    if progress is not None:
        made = f"Trained by moepp_megatron with {settings} (`moepp train {TRAINING_CONFIG_FILE}`)"
    return _CARD.format(
        license=license_id,
        name=" ".join((config.run.name or folder.name).split()),
        experts="".join(_experts(config, model_type)),
        facts="\n".join(
            f"| {key} | {value} |" for key, value in _facts(folder, config, dtype, progress)
        ),
        reader=_READERS[model_type],
        loading=_loading(model_type, export),
        made=made,
        command=command,
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


def _facts(
    folder: Path, config: Config, dtype: str, progress: Progress | None
) -> Iterator[tuple[str, str]]:
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
    if progress is not None:
        yield "trained on", f"{progress.tokens:,} tokens in {progress.step:,} steps"
        yield from _measured(folder, progress.step)
    yield "sequence length", f"{model.seq_length:,} tokens"
    yield "weights", dtype


def _progress(folder: Path) -> Progress | None:
    try:
        record = SavedRecord.read(folder)
    except ValueError:
        return None
    return None if record is None else record.progress


def _measured(folder: Path, step: int) -> Iterator[tuple[str, str]]:
    """The run's last record up to the checkpoint's step; nothing where the run is not around it."""
    try:
        records = read_metrics(folder.parent.parent / METRICS_FILE)
    except MetricsError:
        return
    if earlier := records[records.steps <= step]:
        record = earlier[-1]
        for what, value, form in (
            ("FFN share measured", record.ffn_fraction, "{:.3f}"),
            ("training loss", record.loss, _NATS),
            ("validation loss", record.valid_loss, _NATS),
        ):
            if value is not None:
                yield f"{what} at step {record.step:,}", form.format(value)


def _loading(model_type: str, export: Path) -> str:
    reader = _READERS[model_type]
    if reader is _LLAMA_CPP:
        return ""
    has_code = reader is _OWN_FILES
    with_code, without = (f", trust_remote_code={has}" if has_code else "" for has in (True, False))
    text = _MODEL.format(with_code)
    if (export / TOKENIZER_FILE).is_file():
        text += _TOKENIZER.format(without)
        template = read_tokenizer_config(export).get("chat_template")
        if template is not None or (export / CHAT_TEMPLATE_FILE).is_file():
            text += _CHAT
    return f"\n{text}```\n{_OF_CODE if has_code else ''}"


_NATS = "{:.4f} nats per token"
_CARD = """\
---
license: {license}
library_name: transformers
pipeline_tag: text-generation
tags:
- moe
- moe++
---

# {name}

{experts}

| | |
|---|---|
{facts}

## Use

It needs {reader}.
{loading}
## How it was made

{made}, and exported with:

```bash
{command}
```
"""
_MODEL = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER"{})
"""
_TOKENIZER = """\
tokenizer = AutoTokenizer.from_pretrained("FOLDER"{})
"""
_CHAT = """\
messages = [{"role": "user", "content": "Hello"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
"""
_OF_CODE = """
vLLM serves it with `--model-impl transformers --trust-remote-code`, or, where moepp_megatron is \
installed, without these.

For fine-tuning, `output_router_logits=True` adds the balance loss (times `router_aux_loss_coef`) \
to the loss; without it routers may leave their balance.
"""
