"""MoE++ exports as a model of vLLM's own; vLLM finds `register` by its entry point.

model.py  vLLM's Llama around the exported MoE layer with vLLM's fused FFN experts
"""

from typing import Any

# Whose internals model.py builds on; the extra `vllm` in pyproject.toml has the same.
VERSION = "0.32"


def register() -> None:
    """Register the model and its configuration, in each process of vLLM; not in another version."""
    from transformers import AutoConfig
    from vllm import ModelRegistry, __version__
    from vllm.logger import init_logger
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from moepp_megatron.interop.hf_files.configuration_moepp import MoeConfig, MoEPPConfig

    if not __version__.startswith(f"{VERSION}."):
        init_logger(__name__).warning(
            f"vllm ({__version__}) must be {VERSION} for moepp_megatron's model, left out here; "
            "serve MoE++ models with --model-impl transformers --trust-remote-code"
        )
        return
    for config, architecture in ((MoEPPConfig, "MoEPPForCausalLM"), (MoeConfig, "MoeForCausalLM")):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        ModelRegistry.register_model(architecture, f"{__name__}.model:MoEPPForCausalLM")
        MODELS_CONFIG_MAP[architecture] = _ModelConfig


class _ModelConfig:
    """vLLM's `VerifyAndUpdateConfig`."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Give vLLM the number of experts: without one it has no expert parallelism, no routes."""
        model_config.model_arch_config.num_experts = model_config.hf_config.total_experts

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse (ValueError, one line each) what the model does not compute."""
        from vllm.platforms import current_platform

        parallel, model = vllm_config.parallel_config, vllm_config.model_config
        is_cpu, hf, kernel = current_platform.is_cpu(), model.hf_config, vllm_config.kernel_config
        if not is_cpu and kernel.moe_backend == "auto":
            kernel.moe_backend = "triton"
        staged = parallel.pipeline_parallel_size > 1
        all_heads = hf.qk_norm and hf.qk_norm_scope == "all_heads"
        unaligned = hf.hidden_size % 32 > 0
        # When it holds, section, name, what it must be, why.
        rows = (
            (True, parallel, "data_parallel_size", 1, "whose ranks multiply their own tokens"),
            (True, parallel, "prefill_context_parallel_size", 1, "whose ranks have all tokens"),
            (True, parallel, "enable_eplb", False, "which numbers experts as the router does"),
            (True, parallel, "enable_ep_weight_filter", False, "which counts FFN experts only"),
            (True, model, "quantization", None, "which loads weights as they are exported"),
            (True, vllm_config, "lora_config", None, "which has no adapters"),
            (all_heads, parallel, "tensor_parallel_size", 1, "whose norms see all heads"),
            (is_cpu and unaligned, hf, "hidden_size", "a multiple of 32", "as vLLM's kernel asks"),
            (is_cpu and staged, model, "enforce_eager", False, "whose stages need a warm-up"),
            (not is_cpu, kernel, "moe_backend", "triton", "whose kernels skip rows"),
        )
        problems = [
            f"{name} ({getattr(section, name)}) must be {must} in moepp_megatron's model for vLLM, "
            f"{reason}; use that, or --model-impl transformers --trust-remote-code"
            for holds, section, name, must, reason in rows
            if holds and getattr(section, name) != must
        ]
        if problems:
            raise ValueError("\n".join(problems))
