"""Parameters that every rank of a tensor-parallel group holds whole."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


def replicated_parameter(config: TransformerConfig, *shape: int) -> torch.nn.Parameter:
    """A parameter of routers and zero-computation experts, initialised as `config` says.

    Under sequence parallelism every tensor-parallel rank sees other tokens; a mark makes Megatron
    sum the gradients over them.
    """
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    # Drawn in fp32 and then rounded, as megatron-core does for its router.
    data = torch.empty(*shape, dtype=torch.float32, device=device)
    if config.perform_initialization:
        config.init_method(data)
    parameter = torch.nn.Parameter(data.to(config.params_dtype))
    setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010
    return parameter
