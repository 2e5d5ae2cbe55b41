"""Prefill and decode of exports in transformers, next to a Mixtral of the same size, in turns.

python -m benchmarks.serve_throughput benchmarks/results/serve_throughput.jsonl

Weights are random; a selection bias sets the share of FFN experts among picks. Time is that of one
thread. Models first run with their products counted: FFN experts multiply the rows picked.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM
from transformers.integrations import moe

from moepp_megatron.interop.hf_files.configuration_moepp import MoEPPConfig
from moepp_megatron.interop.hf_files.modeling_moepp import MoEPPForCausalLM
from moepp_megatron.runtime.atomic import write_result

SHARES, BATCHES, LENGTH, NEW, REPEATS = (1.0, 0.6, 0.3), (1, 16), 64, 4, 3
FFN, VOCAB, INNER = 8, 4096, 1408
SIZES = {"vocab_size": VOCAB, "hidden_size": 512, "intermediate_size": INNER}
SIZES |= {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8}
# Implementations by how many tokens they read first: `batched_mm` copies an expert for each row.
PROMPTS = {"eager": LENGTH, "grouped_mm": LENGTH, "batched_mm": NEW}


def tokens(*shape: int) -> torch.Tensor:
    """Random ids [b, s]."""
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def moepp(share: float) -> Any:
    """A MoE++ model whose routers pick FFN experts for this share of all picks."""
    config = MoEPPConfig(num_ffn_experts=FFN, selection_bias=True, **SIZES)
    model, low, high = MoEPPForCausalLM(config).eval(), -0.3, 0.3
    for _ in range(12):
        bias = (low + high) / 2
        for layer in model.model.layers:
            layer.mlp.moe.gate.e_score_correction_bias[:FFN] = bias
        with counted(model) as counts:
            model(input_ids=tokens(4, LENGTH))
        low, high = (bias, high) if counts["picked"] < share * counts["picks"] else (low, bias)
    return model


@contextmanager
def counted(model: Any) -> Any:
    """Counts the picks of all routers, those of FFN experts, and the rows that these multiply."""
    counts: Counter[str] = Counter()

    def watched(function: Any) -> Any:
        def call(x: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
            # The first of an expert's two products; the grouped one ends at the last offset.
            if weight.shape[-2] == 2 * INNER:
                is_grouped = function.__name__ == "_grouped_linear"
                counts["rows"] += int(args[0][-1]) if is_grouped else len(x)
            return function(x, weight, *args, **kwargs)

        return call

    def look(module: Any, args: Any, output: Any) -> None:
        counts["picks"] += output[1].numel()
        counts["picked"] += int((output[1] < FFN).sum())

    places = (moe, "_grouped_linear"), (moe, "_batched_linear"), (torch.nn.functional, "linear")
    with ExitStack() as stack:
        for place, name in places:
            stack.enter_context(mock.patch.object(place, name, watched(getattr(place, name))))
        for layer in model.model.layers if isinstance(model, MoEPPForCausalLM) else ():
            stack.callback(layer.mlp.moe.gate.register_forward_hook(look).remove)
        yield counts


def run(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """Tokens per second of reading [b, s] ids, and of writing after them."""
    cache, begin = DynamicCache(config=model.config), time.process_time()
    model(input_ids=ids, cache=cache, logits_to_keep=1)
    read = time.process_time()
    for index in range(NEW):
        model(input_ids=ids[:, index : index + 1], cache=cache)
    written = NEW * len(ids) / (time.process_time() - read)
    return {"prefill": ids.numel() / (read - begin), "decode": written}


def measure(models: dict[str, Any], experts: str, batch: int) -> Any:
    """One row for each model, timed in turns."""
    ids = tokens(batch, PROMPTS[experts])
    rates, counts = defaultdict(list), {}
    for name, model in models.items():
        model.set_experts_implementation(experts)
        with counted(model) as counts[name]:
            run(model, ids)
        assert name == "vanilla" or counts[name]["rows"] == counts[name]["picked"] > 0, experts
    for _ in range(REPEATS):
        for name, model in models.items():
            for phase, rate in run(model, ids).items():
                rates[name, phase].append(rate)
    for name in models:
        row: dict[str, Any] = {"batch": batch, "experts": experts, "model": name, **counts[name]}
        for phase in ("prefill", "decode"):
            pairs = zip(rates[name, phase], rates["vanilla", phase], strict=True)
            row[f"{phase}_tokens_per_s"] = round(statistics.median(rates[name, phase]), 1)
            row[f"{phase}_of_vanilla"] = round(statistics.median(a / b for a, b in pairs), 2)
        yield row


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    mixtral = MixtralConfig(num_local_experts=FFN, num_experts_per_tok=2, **SIZES)
    models = {"vanilla": MixtralForCausalLM(mixtral).eval()}
    models |= {f"FFN share {share:g}": moepp(share) for share in SHARES}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    lines = [{"made": f"{platform.machine()} CPU, fp32, {versions}", "prompts": PROMPTS, **SIZES}]
    lines += [row for b in BATCHES for experts in PROMPTS for row in measure(models, experts, b)]
    write_result(Path(sys.argv[1]), "".join(f"{json.dumps(line)}\n" for line in lines).encode())
