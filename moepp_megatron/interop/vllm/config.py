"""What vLLM asks about a MoE++ model before it is built, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class MoEPPModelConfig:
    """vLLM's `VerifyAndUpdateConfig`."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Give vLLM the number of experts: without one it has no expert parallelism, no routes."""
        model_config.model_arch_config.num_experts = model_config.hf_config.total_experts

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse (ValueError, one line each) what the model does not compute."""
        problems = [
            f"{name} ({value}) must be {must} in moepp_megatron's model for vLLM: {reason}; use "
            "that, or --model-impl transformers --trust-remote-code"
            for name, value, must, reason in _refused(vllm_config)
        ]
        if problems:
            raise ValueError("\n".join(problems))


def _refused(vllm_config: Any) -> Iterator[tuple[str, Any, Any, str]]:
    """(name, value, what it must be, why) of each setting that the model cannot have."""
    from vllm.platforms import current_platform

    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    hf, is_cpu = model.hf_config, current_platform.is_cpu()
    tensor_parallel = parallel.tensor_parallel_size
    wanted = {
        "data_parallel_size": (parallel.data_parallel_size, 1),
        "prefill_context_parallel_size": (parallel.prefill_context_parallel_size, 1),
    }
    for name, (value, must) in wanted.items():
        if value != must:
            yield name, value, must, "ranks would multiply rows of other tokens"
    if parallel.enable_eplb:
        yield "enable_eplb", True, False, "picks name the experts as the model has them"
    if model.quantization is not None:
        yield "quantization", model.quantization, None, "weights are loaded as they are exported"
    if hf.qk_norm and hf.qk_norm_scope == "all_heads" and tensor_parallel > 1:
        yield "tensor_parallel_size", tensor_parallel, 1, "norms of all heads see one rank's"
    if is_cpu and hf.hidden_size % 32:
        yield "hidden_size", hf.hidden_size, "a multiple of 32", "vLLM's kernel asks for it"
    if is_cpu and model.enforce_eager and parallel.pipeline_parallel_size > 1:
        yield "enforce_eager", True, False, "a stage gets its buffers as vLLM warms up"
    if not is_cpu and not model.enforce_eager:
        yield "enforce_eager", False, True, "the number of FFN rows is read on the host"
    if not is_cpu and parallel.enable_expert_parallel:
        yield "enable_expert_parallel", True, False, "it was tested on CPUs only"
