"""A program for vLLM's own environment: the plug-in's answers, and what its workers compute.

python plugin_answers.py EXPORT PROMPTS.json OUT.json [argument=json ...]
"""

import json
import os
import sys
from pathlib import Path

from tests.interop.vllm_answers import answers, engine, sampling


def watch(worker):
    """Count the rows that vLLM's kernel multiplies, and let its capturer have the model's picks.

    The model's module, and if its decoder is compiled.
    """
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
        RoutedExpertsCapturer,
        bind_routed_experts_capturer,
    )

    model, kernel = worker.get_model(), cpu_moe.cpu_fused_moe
    worker.rows, worker.capturer = 0, RoutedExpertsCapturer(64, worker.vllm_config)
    bind_routed_experts_capturer(model, worker.capturer)

    def counted(out, rows, *rest):
        picks = rest[5]
        assert len(picks) == len(rows)
        assert 0 <= picks.min() <= picks.max() < len(rest[0])
        worker.rows += picks.numel()
        kernel(out, rows, *rest)

    cpu_moe.cpu_fused_moe = counted
    return type(model).__module__, getattr(model.model, "compiled", False)


def watched(worker, tokens):
    """The rows since `watch`, and the picks of the last step, [tokens, layers, K]."""
    return worker.rows, worker.capturer.snapshot_routing_data(tokens).tolist()


def main():
    # Functions are sent to workers; one worker runs here, several are spawned.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    export, prompts, out, *given = sys.argv[1:]
    own = {"model_impl": "auto", "trust_remote_code": False, "enforce_eager": False}
    model = engine(export, given, **own)
    prompts_ids = json.loads(Path(prompts).read_text())
    found = {"answers": answers(model, prompts_ids)}
    found["models"] = model.collective_rpc(watch)
    # One step: the prompt by itself.
    prompt = prompts_ids[-1]
    model.generate([{"prompt_token_ids": prompt}], sampling(max_tokens=1))
    found["watched"] = model.collective_rpc(watched, args=(len(prompt),))
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
