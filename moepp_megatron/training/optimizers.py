"""Builds megatron-core's optimizer: its kind, and the groups of parameters that differ."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as upstream
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
)
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor

from moepp_megatron.config import Config
from moepp_megatron.config.choices import pick
from moepp_megatron.config.schema.optimizer import OptimizerSection, ParameterGroups
from moepp_megatron.model.megatron_config import DTYPES, params_dtype

_MATRICES = "matrices"


def _named_after(kind: str, settings: OptimizerSection) -> dict[str, Any]:
    names = [name for name in type(settings).model_fields if name.startswith(f"{kind}_")]
    return {"optimizer": kind} | {name: getattr(settings, name) for name in names}


# What `optimizer.kind` may name: Megatron's settings of only this optimizer.
OPTIMIZERS: dict[str, Callable[[OptimizerSection], dict[str, Any]]] = {
    kind: partial(_named_after, kind) for kind in ("adam", "muon", "lion")
}


def build_optimizer(config: Config, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Megatron's optimizer over all wrapped model chunks of this rank; every rank must call."""
    settings, overrides = _optimizer_config(config), _parameter_overrides(config)
    if not config.optimizer.is_emerging:
        return get_megatron_optimizer(
            settings, chunks, config_overrides=overrides, use_gloo_process_groups=False
        )
    # The public function refuses overrides that name an optimizer.
    optimizer = upstream._get_megatron_emerging_optimizer(settings, chunks, overrides)
    if isinstance(optimizer, LayerWiseDistributedOptimizer):
        for part in optimizer.chained_optimizers:
            # Each parameter is held by one data-parallel rank: norms are sums over all ranks.
            part.grad_stats_parallel_group = dist.group.WORLD
    return optimizer


def _optimizer_config(config: Config) -> OptimizerConfig:
    settings, parallel = config.optimizer, config.parallel
    dtype, is_emerging = params_dtype(config), config.optimizer.is_emerging
    # With one rank there is nothing to share out, and megatron-core would store experts that
    # several ranks hold (expert tensor ranks are fewer than tensor ranks) once for each of them.
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    by_layer = parallel.use_distributed_optimizer and is_emerging and ranks > 1
    # Adam trains the other parameters.
    of_kind = _named_after("adam", settings)
    if settings.of_fused_adam:
        # Transformer Engine's FusedAdam keeps the moments, and in most cases the fp32 weights too.
        of_kind |= {
            "use_precision_aware_optimizer": True,
            "exp_avg_dtype": DTYPES[settings.exp_avg_dtype],
            "exp_avg_sq_dtype": DTYPES[settings.exp_avg_sq_dtype],
            "store_param_remainders": settings.store_param_remainders,
        }
    of_kind |= pick(OPTIMIZERS, "optimizer.kind", settings.kind, "optimizers")(settings)
    return OptimizerConfig(
        **of_kind,
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        clip_grad=settings.clip_grad,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_distributed_optimizer=parallel.use_distributed_optimizer and not is_emerging,
        use_layer_wise_distributed_optimizer=by_layer,
        overlap_param_gather=parallel.overlap_param_gather,
        # How it cuts FP8 weights depends on their format.
        fp8_recipe=config.precision.recipe,
    )


def _parameter_overrides(config: Config) -> dict[ParamKey, ParamGroupOverride]:
    """Settings that differ from the optimizer's own, for each kind of parameters."""
    overrides: dict[ParamKey, ParamGroupOverride] = {}
    for kind in ParameterGroups.model_fields:
        for is_vector in (False, True):
            override = _override(config, kind, is_vector)
            if override:
                fits = partial(_is_of_kind, kind, is_vector)
                name = f"{kind}, vectors" if is_vector else kind
                key = ParamKey(with_name_predicate=ParamWithNamePredicate(name, fits))
                overrides[key] = override
    return overrides


def _override(config: Config, kind: str, is_vector: bool) -> ParamGroupOverride:
    settings = config.optimizer
    group, override = getattr(settings.groups, kind), ParamGroupOverride()
    if group.lr_mult != 1.0:
        override["max_lr"] = settings.lr * group.lr_mult
        override["min_lr"] = settings.min_lr * group.lr_mult
    if group.weight_decay is not None:
        override["start_wd"] = override["end_wd"] = group.weight_decay
    elif is_vector:
        # megatron-core's own default (get_standard_config_overrides).
        override["wd_mult"] = 0.0
    if settings.is_emerging:
        override["optimizer"] = "adam"
    return override


def _is_of_kind(kind: str, is_vector: bool, parameter: Tensor, name: str) -> bool:
    return kind == _parameter_kind(parameter, name) and is_vector == _is_vector(parameter, name)


def _is_vector(parameter: Tensor, name: str) -> bool:
    """True if megatron-core does not decay it (get_standard_config_overrides)."""
    return parameter.dim() == 1 or name.endswith(".bias")


def _parameter_kind(parameter: Tensor, name: str) -> str:
    """Return a parameter's field of `ParameterGroups`, or `matrices`; it may be wrapped."""
    if ".router." in name or name.endswith(".shared_experts.gate_weight"):
        return "router"
    if name.endswith((".constants", ".mixing_weight")):
        return "constants"
    if getattr(parameter, "is_embedding_or_output_parameter", False):
        return "embeddings"
    return "norms_and_biases" if _is_vector(parameter, name) else _MATRICES
