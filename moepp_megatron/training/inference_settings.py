"""Turns a training configuration into one for forward passes only: scoring and generation."""

from typing import Any

from moepp_megatron.config import ConfigError
from moepp_megatron.config.errors import show
from moepp_megatron.config.load import parse_override
from moepp_megatron.config.schema.megatron import MegatronSection
from moepp_megatron.config.sections import settings_of_one_run

# One rank, unless the command line says otherwise, and nothing that only training wants.
FORWARD_ONLY = (
    "parallel.tensor_model_parallel_size=1",
    "parallel.pipeline_model_parallel_size=1",
    "parallel.virtual_pipeline_model_parallel_size=null",
    "parallel.pipeline_model_parallel_layout=null",
    "parallel.expert_model_parallel_size=1",
    "parallel.expert_tensor_parallel_size=null",
    "parallel.context_parallel_size=1",
    # Without effect but where tensor parallelism needs it.
    "parallel.sequence_parallel=true",
    "parallel.overlap_grad_reduce=false",
    "parallel.overlap_param_gather=false",
    "parallel.overlap_moe_expert_parallel_comm=false",
    "parallel.delay_wgrad_compute=false",
    # Nothing is optimized.
    "optimizer.kind=adam",
    "optimizer.exp_avg_dtype=fp32",
    "optimizer.exp_avg_sq_dtype=fp32",
    "optimizer.store_param_remainders=false",
    # Its packages want several ranks; the others give the same results.
    "moe.dispatcher=alltoall",
    "moe.flex_backend=auto",
    "moe.flex_num_sms=null",
    # FP8 GEMMs take tokens by sixteens, and there may be any number.
    "precision.fp8=null",
    "precision.fp8_recipe=null",
    "precision.fp8_param=false",
    "precision.first_last_layers_bf16=false",
    # Activations are kept for no backward pass.
    "training.recompute_granularity=null",
    "training.recompute_method=null",
    "training.recompute_num_layers=null",
    "training.micro_batch_size=1",
    "training.batch_ramp=null",
    # What they make faster is training.
    *(
        f"megatron.{name}={show(field.default)}"
        for name, field in MegatronSection.model_fields.items()
    ),
    *settings_of_one_run(),
    # Sequences are of any length.
    "training.cuda_graphs=[]",
    # A limit would make a token's logits depend on which other tokens are there.
    "moe.capacity_factor=null",
    # Noise on the router's input, which megatron-core adds outside of training too.
    "moe.input_jitter_eps=null",
)


def inference_override(override: str) -> tuple[str, Any]:
    """Return key and value of an override; ConfigError if the checkpoint decides the setting."""
    section, key, value = parse_override(override)
    if section not in ("parallel", "precision"):
        raise ConfigError(
            f"override {section}.{key} must be in section parallel or precision: the checkpoint "
            "says the rest; leave it out"
        )
    return key, value
