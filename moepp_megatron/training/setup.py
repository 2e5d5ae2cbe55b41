"""Wraps the model for training: precision, data parallelism, optimizer, schedule."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, clip_grads
from megatron.core.optimizer_param_scheduler import (
    OptimizerParamScheduler,
    get_canonical_lr_for_logging,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor

from moepp_megatron.config import Config, UnfitError
from moepp_megatron.model.build import build_model
from moepp_megatron.model.gpt import MoEPPGPTModel
from moepp_megatron.model.megatron_config import moepp_config, params_dtype
from moepp_megatron.moe.kernels import start_kernel, use_kernels
from moepp_megatron.moe.lane import pipeline_config
from moepp_megatron.moe.layer import MoEPPLayer, moepp_layers
from moepp_megatron.runtime.backends import chosen_cross_entropy
from moepp_megatron.runtime.fit import modules_with_extension
from moepp_megatron.runtime.patches import replace
from moepp_megatron.training.optimizers import build_optimizer
from moepp_megatron.training.schedule import build_schedule


@dataclass
class TrainingModel:
    """Everything that a training step changes."""

    chunks: list[DistributedDataParallel]
    models: list[MoEPPGPTModel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    @property
    def layers(self) -> list[MoEPPLayer]:
        """This rank's MoE++ layers, in their order."""
        return [layer for model in self.models for layer in moepp_layers(model)]

    @property
    def optimizers(self) -> list[Any]:
        """The optimizers that `optimizer` chains."""
        return list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))

    @property
    def learning_rate(self) -> float:
        """The rate of the newest step, where `optimizer.groups` does not multiply it."""
        # True on every rank, even where a group is empty.
        rate = get_canonical_lr_for_logging(self.optimizer.param_groups)
        assert rate is not None, "no group of parameters has the schedule's own rate"
        return float(rate)

    def set_training(self, training: bool) -> None:
        """Switch all chunks between training and evaluation."""
        for chunk in self.chunks:
            chunk.train(training)
        if self.models[0].config.fine_grained_activation_offloading:
            from megatron.core.pipeline_parallel import fine_grained_activation_offload

            offload = fine_grained_activation_offload.FineGrainedActivationOffloadingInterface
            # No backward pass of an evaluation would fetch back what it has sent to the host.
            (offload.enable_offload if training else offload.disable_offload)()

    @contextmanager
    def gathered_parameters(self) -> Iterator[None]:
        """Gather all parameters on every rank for the block; every rank must enter.

        With `parallel.overlap_param_gather` a step leaves each rank with its share of the new
        parameters, and the next forward pass gathers the others. Whoever reads parameters between
        steps must gather them first, as Megatron-LM's training loop does.
        """
        overlapping = [chunk for chunk in self.chunks if chunk.use_forward_hook]
        for chunk in overlapping:
            chunk.disable_forward_pre_hook(param_sync=True)
        try:
            yield
        finally:
            for chunk in overlapping:
                chunk.enable_forward_pre_hook()


def build_training_model(config: Config) -> TrainingModel:
    """Build and wrap the model. Process groups must exist.

    UnfitError if this machine or the installed megatron-core lacks what the layers use.
    """
    if torch.cuda.is_available():
        in_layers = not config.moe.is_vanilla and use_kernels(config.moe.fused)
        if in_layers or chosen_cross_entropy(config.precision.cross_entropy) == "fused":
            _start_a_kernel()
    if modules_with_extension(config):
        _compile_extension()
    _replace_l2_norm()
    models = build_model(config)
    schedule_config, chunks = _wrap_models(models, config)
    optimizer = build_optimizer(config, chunks)
    _connect_schedule(schedule_config, config, chunks, optimizer)
    return TrainingModel(chunks, models, optimizer, build_schedule(config, optimizer))


def _start_a_kernel() -> None:
    """Compile and launch a kernel, to fail before minutes of building and loading."""
    try:
        start_kernel(torch.device("cuda", torch.cuda.current_device()))
    except RuntimeError as error:
        raise UnfitError(
            "moe.fused and precision.cross_entropy must have Triton kernels that start on this "
            f"machine ({error}); see moepp doctor, or use false and unfused"
        ) from error


def _compile_extension() -> None:
    """Compile megatron-core's extension for `recompute_modules`; UnfitError names the cause."""
    # It would be compiled in the first backward pass, while other ranks wait in collectives. The
    # first process of a machine compiles it, which takes 20 seconds; the others wait for it.
    from megatron.core.tensor_parallel.random import _get_share_storage

    try:
        _get_share_storage()
    except (ImportError, OSError, RuntimeError) as error:
        cause = " ".join(str(error).split())[:500]
        raise UnfitError(
            "training.recompute_modules (layernorm, mla_up_proj, moe_act) must have an extension "
            f"of megatron-core's that compiles on this machine ({cause}); see moepp doctor, or "
            "leave them out"
        ) from error


def _wrap_models(
    models: list[MoEPPGPTModel], config: Config, casts: bool = True
) -> tuple[TransformerConfig, list[DistributedDataParallel]]:
    """Give every parameter its place in the buffers that gradients are reduced in."""
    # With `casts` also wrapped for mixed precision, which needs initialised parameters.
    schedule_config = pipeline_config(models[0].config, moepp_config(config))
    chunks = [
        _wrap(model, schedule_config, config, bucketed=index == 0, casts=casts)
        for index, model in enumerate(models)
    ]
    return schedule_config, chunks


def _wrap(
    model: MoEPPGPTModel,
    schedule_config: TransformerConfig,
    config: Config,
    bucketed: bool,
    casts: bool,
) -> DistributedDataParallel:
    parallel = config.parallel
    module: torch.nn.Module = model
    _fuse_weight_gradients(model)
    if casts and params_dtype(config) is torch.bfloat16:
        module = Float16Module(model.config, model)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.precision.grad_reduce_in_fp32,
        # An emerging optimizer wants each matrix whole, and shares out whole ones by itself.
        use_distributed_optimizer=parallel.use_distributed_optimizer
        and not config.optimizer.is_emerging,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_param_gather=config.precision.fp8_param,
        delay_wgrad_compute=parallel.delay_wgrad_compute,
    )
    # The schedules read their tensor width from the outermost module's configuration.
    return DistributedDataParallel(
        schedule_config, ddp_config, module, disable_bucketing=not bucketed
    )


def _fuse_weight_gradients(model: torch.nn.Module) -> None:
    """Have Transformer Engine's layers add weight gradients to their buffers inside the product."""
    # megatron-core has one setting for them and its own output layer,
    # `gradient_accumulation_fusion`, and that layer cannot be built with it where apex is not there
    # (tensor_parallel/layers.py, `ColumnParallelLinear`). Transformer Engine reads this attribute
    # of each layer in each pass.
    for layer in model.modules():
        if hasattr(layer, "fuse_wgrad_accumulation"):
            replace(layer, "fuse_wgrad_accumulation", True)


def _connect_schedule(
    schedule_config: TransformerConfig,
    config: Config,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
) -> None:
    """Give the pipeline schedules the hooks that they call."""
    schedule_config.grad_scale_func = optimizer.scale_loss
    schedule_config.finalize_model_grads_func = finalize_model_grads
    if config.parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        schedule_config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]


def _replace_l2_norm() -> None:
    """Replace megatron-core's own norm, where it is used on a GPU; CPU runs keep their bits."""
    if torch.cuda.is_available() and clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        replace(clip_grads, "l2_norm_impl", _l2_norm)


def _l2_norm(
    chunk_size: int,
    no_op: Tensor,
    tensor_lists: Sequence[Sequence[Tensor]],
    per_tensor: bool,
    *unused: Any,
) -> tuple[Tensor, None]:
    """Compute the [1] fp32 norm of all tensors, in the form of apex's multi-tensor kernel."""
    tensors = [tensor for tensors in tensor_lists for tensor in tensors]
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(tensors)])
    return torch.linalg.vector_norm(norms).reshape(1), None
