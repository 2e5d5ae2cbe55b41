"""MoE++ exports as a model of vLLM's own; vLLM finds `register` by its entry point.

config.py  what vLLM asks about the model, and what is refused
model.py   the model: vLLM's attention and fused FFN experts, and the exported file's routing
"""

# What model.py and config.py build on; the extra `vllm` in pyproject.toml has the same.
VERSION = "0.32"


def register() -> None:
    """Register the model and its configuration, in each process of vLLM; another version: not."""
    from transformers import AutoConfig
    from vllm import ModelRegistry, __version__
    from vllm.logger import init_logger
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from moepp_megatron.interop.hf_files.configuration_moepp import MoeConfig, MoEPPConfig
    from moepp_megatron.interop.vllm.config import MoEPPModelConfig

    if not __version__.startswith(f"{VERSION}."):
        init_logger(__name__).warning(
            "vllm (%s) must be %s for moepp_megatron's model, which is left out; MoE++ models run "
            "with --model-impl transformers --trust-remote-code",
            __version__,
            VERSION,
        )
        return
    for config, architecture in ((MoEPPConfig, "MoEPPForCausalLM"), (MoeConfig, "MoeForCausalLM")):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        ModelRegistry.register_model(architecture, f"{__name__}.model:MoEPPForCausalLM")
        MODELS_CONFIG_MAP[architecture] = MoEPPModelConfig
