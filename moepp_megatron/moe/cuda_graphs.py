"""Attention, router and experts of a layer as CUDA graphs; the rest is launched normally.

    attention | norm, router logits, scores, selection, gates | losses, limits, counts | experts
    -- graph -- ------------------ graph ----------------------      no graph            - graph -

A graph repeats kernels on fixed addresses; Python code runs only once, at capture. So the cut is
where the router stops being a function of its tensors: `MoEPPRouter.choose` is in the graph,
`finish` (losses, capacity limits, statistics) is not. Dispatch to combine is a function of tensors
only with static rows: without them the host reads sizes, which change with every pass. A pass
without static rows replays no graph at all, because a graph expects its inputs where the graph
before it has left them.

megatron-core's "local" graphs do the work (`CudaGraphManager`): the first training step runs
eagerly and is recorded, graphs are made at its end, later steps replay them.
"""

from typing import Any

import torch
from megatron.core.transformer.cuda_graphs import CudaGraphManager
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.transformer_config import TransformerConfig

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.upstream_versions import TESTED_VERSION, refuse_elsewhere

# Of a layer, the function to capture for each part.
_FUNCTIONS = {
    CudaGraphModule.attn: "_forward_attention",
    CudaGraphModule.moe_router: "_forward_router",
    CudaGraphModule.moe: "_forward_experts",
}
# What megatron-core may name: it refuses moe without capacities, so `MoEPPConfig` has it.
_NAMED = {CudaGraphModule.attn, CudaGraphModule.moe_router}
# megatron-core adds it to moe_router by itself. Nothing here is captured for it.
_IMPLIED = CudaGraphModule.moe_preprocess


class CapturedParts:
    """The parts of one layer that run as graphs (`cuda_graph_modules`); replaces their methods.

    Attributes:
        parts: What they are: `moe_router` is norm and router, `moe` dispatch to combine.
        replays: Whether training passes replay them.
    """

    def __init__(self, layer: torch.nn.Module, config: TransformerConfig) -> None:
        self._layer, self._config = layer, config
        self._is_pipeline = config.pipeline_model_parallel_size > 1
        self.parts: set[CudaGraphModule] = set()
        self.replays = True
        for part in _NAMED.intersection(config.cuda_graph_modules):
            self.add(part)

    def add(self, part: CudaGraphModule) -> None:
        """Capture a part."""
        self.parts.add(part)
        manager = CudaGraphManager(self._config, self._layer, function_name=_FUNCTIONS[part])
        # A submodule, so that it learns of training and evaluation; it has no parameters.
        self._layer.add_module(f"{part.name}_graphs", manager)

    def arguments(self, part: CudaGraphModule, **kwargs: Any) -> dict[str, Any]:
        """The keyword arguments for a method that may be captured.

        Graphs run only in training: evaluation routes without losses, generation has other shapes.

        megatron-core gives graphs that take the same tensor one input buffer, and insists that all
        of them are captured before the first backward graph. Among pipeline stages the next
        micro-batches come after that, and the rotary embedding is one tensor for all of them; so
        each call gets its own tensor object.
        """
        if part not in self.parts:
            return kwargs
        if not (self.replays and self._layer.training and torch.is_grad_enabled()):
            return {**kwargs, "eager": True}
        if self._is_pipeline:
            return {
                name: value.detach() if name.startswith("rotary") and value is not None else value
                for name, value in kwargs.items()
            }
        return kwargs


def refuse_uncapturable(config: TransformerConfig, moepp: MoEPPConfig) -> None:
    """Refuse settings that no graph of a MoE++ layer can hold (ValueError)."""
    if config.cuda_graph_impl == "none":
        return
    has_router = CudaGraphModule.moe_router in config.cuda_graph_modules
    if moepp.captures_experts and (moepp.static_rows is None or not has_router):
        raise ValueError(
            f"captures_experts ({moepp.captures_experts}) must come with static_rows and with "
            "moe_router in TransformerConfig.cuda_graph_modules; use False"
        )
    refuse_elsewhere(
        "cuda_graph_impl",
        config.cuda_graph_impl,
        "none",
        f"what graphs of MoE++ layers rely on has been tested only with {TESTED_VERSION}, and "
        "another version may replay wrong numbers without an error",
    )
    if config.cuda_graph_impl != "local":
        raise ValueError(
            f"TransformerConfig.cuda_graph_impl ({config.cuda_graph_impl}) must be local or none "
            "with MoE++ layers: whole iterations hold the host-side sizes of the all-to-all, and "
            "TransformerLayer._te_cuda_graph_replay resumes a layer after its router without the "
            "router logits; use local"
        )
    parts = [part for part in config.cuda_graph_modules if part is not _IMPLIED]
    if not parts or set(parts) - _NAMED:
        names = [part.name for part in parts]
        raise ValueError(
            f"TransformerConfig.cuda_graph_modules ({names}) must hold attn, moe_router or both "
            "with MoE++ layers: the number of tokens of an expert is another in every step, and a "
            "graph's sizes are fixed; use [attn, moe_router]"
        )
    if config.moe_enable_routing_replay and has_router:
        raise ValueError(
            f"TransformerConfig.moe_enable_routing_replay ({config.moe_enable_routing_replay}) "
            "must be False with moe_router in cuda_graph_modules, because a graph would repeat the "
            "routes of its capture; use False, or capture attn only"
        )
    if config.recompute_granularity is not None:
        raise ValueError(
            f"TransformerConfig.recompute_granularity ({config.recompute_granularity}) must be "
            "None with CUDA graphs of MoE++ layers, because a graph runs forward once for each "
            "backward pass; use None"
        )
