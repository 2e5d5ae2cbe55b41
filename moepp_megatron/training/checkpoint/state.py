"""Model, optimizer and schedule as megatron-core's sharded state, the same for every layout.

The names in a checkpoint do not depend on who wrote it:

- Optimizer state is stored per parameter (`optimizer.state.exp_avg.<parameter>`), not per bucket.
- The fp32 copy of a bf16 parameter is `optimizer.state.fp32_param.<parameter>` whichever optimizer
  keeps it. An fp32 parameter needs no copy, so none is stored: the distributed optimizer, which
  holds one all the same, takes the parameter.
- FP8 weights are stored as bf16 ones are.
- Nothing else of the optimizer is stored but the number of its steps. Its parameter groups differ
  between layouts (expert parameters have their own optimizer only where experts are spread over
  ranks), and all that they hold follows from the configuration and the schedule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.models.gpt import GPTModel

from moepp_megatron.training.checkpoint.fp8_state import checked_fp8_state
from moepp_megatron.training.checkpoint.optimizer import (
    complete_state,
    fill_copies,
    is_torch,
    load_sharded,
    padded_state,
    without_collection,
)
from moepp_megatron.training.setup import TrainingModel

METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
_STATE = "optimizer.state."
# What the distributed optimizer calls the fp32 copy, and the other one, whose name is kept.
_COPY, _STORED_COPY = f"{_STATE}param.", f"{_STATE}fp32_param."


def model_state(models: list[GPTModel]) -> dict[str, Any]:
    """Sharded state of this rank's model chunks."""
    return {
        f"model{index}": model.sharded_state_dict(metadata=dict(METADATA))
        for index, model in enumerate(models)
    }


def saved_state(model: TrainingModel) -> dict[str, Any]:
    """The state of model, optimizer and schedule that a checkpoint stores."""
    state = model_state(model.models)
    dtypes = _dtypes(state)
    optimizer = _optimizer_state(model, state, is_loading=False)
    state["optimizer"] = _without_copies(optimizer, dtypes)
    state["optimizer_steps"] = _optimizer_steps(model)
    state["schedule_steps"] = model.scheduler.num_steps
    # Read back in any precision, and without Transformer Engine. Last, because the optimizer knows
    # the weights that it holds state of as objects.
    force_all_tensors_to_non_fp8(state)
    return state


def wanted_state(model: TrainingModel) -> dict[str, Any]:
    """The state to read: like `saved_state`, but entries of this layout alone stay as they are."""
    state = model_state(model.models)
    dtypes = _dtypes(state)
    optimizer = _optimizer_state(model, state, is_loading=True)

    def prepare(entry: Any) -> Any:
        if isinstance(entry, LocalNonpersistentObject):
            return entry
        if not isinstance(entry, ShardedBase):
            return LocalNonpersistentObject(entry)
        entry = _renamed(entry)
        return LocalNonpersistentObject(None) if _is_needless(entry, dtypes) else entry

    state["optimizer"] = dict_list_map_inplace(prepare, optimizer)
    return state


def apply_state(model: TrainingModel, loaded: dict[str, Any]) -> None:
    """Put the state that was read into model, optimizer and schedule."""
    apply_model_state(model.models, loaded)
    optimizer, steps = loaded["optimizer"], loaded["optimizer_steps"]
    optimizers = _chained(model)
    parts = [optimizer] if len(optimizers) == 1 else [optimizer[i] for i in range(len(optimizers))]
    sharded = []
    for part, chained in zip(parts, optimizers, strict=True):
        _set_steps(part, steps, chained.optimizer)
        if "param_state" in part:
            fill_copies(chained, part["param_state"])
        if is_torch(chained.optimizer) and "param_state" in part:
            sharded.append((chained, part.pop("param_state")))
    model.optimizer.load_state_dict(optimizer)
    for chained, tensors in sharded:
        load_sharded(chained, tensors, steps)
    # Its own load_state_dict would insist on the schedule that the checkpoint was written with.
    model.scheduler.num_steps = 0
    model.scheduler.step(increment=loaded["schedule_steps"])


def apply_model_state(models: list[GPTModel], loaded: dict[str, Any]) -> None:
    """Put the state that was read into the model."""
    for index, model in enumerate(models):
        state = loaded[f"model{index}"]
        with checked_fp8_state(state):
            model.load_state_dict(state)


def _optimizer_steps(model: TrainingModel) -> int:
    """Steps that the optimizer has taken; fewer than the run's where some were skipped."""
    for inner in (chained.optimizer for chained in _chained(model) if chained.optimizer):
        for entry in inner.state.values():
            if "step" in entry:  # torch's Adam counts per parameter
                return int(entry["step"])
        for group in inner.param_groups:
            if "step" in group and group["params"]:  # fused Adam counts per group
                return int(group["step"])
    return 0


def _optimizer_state(model: TrainingModel, state: dict[str, Any], is_loading: bool) -> Any:
    tensors = {
        f"{chunk}.{key}": tensor
        for chunk, chunk_state in state.items()
        for key, tensor in chunk_state.items()
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_collection())
        for chained in _chained(model):
            stack.enter_context(complete_state(chained))
            stack.enter_context(padded_state(chained))
        return model.optimizer.sharded_state_dict(
            tensors, is_loading=is_loading, metadata=dict(METADATA)
        )


def _chained(model: TrainingModel) -> list[Any]:
    chained = getattr(model.optimizer, "chained_optimizers", [model.optimizer])
    return list(chained)


def _dtypes(state: dict[str, Any]) -> dict[str, torch.dtype]:
    """Type of each parameter by its key, which the experts of a layer share."""
    return {
        entry.key: entry.data.dtype
        for entry in nested_values(state)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }


def _without_copies(optimizer: Any, dtypes: dict[str, torch.dtype]) -> list[ShardedBase]:
    """The optimizer's entries to store, as a list, because their paths differ between layouts."""
    entries = (_renamed(e) for e in nested_values(optimizer) if isinstance(e, ShardedBase))
    return [entry for entry in entries if not _is_needless(entry, dtypes)]


def _renamed(entry: ShardedBase) -> ShardedBase:
    if isinstance(entry, ShardedTensor | ShardedTensorFactory) and entry.key.startswith(_COPY):
        return replace(entry, key=_STORED_COPY + entry.key.removeprefix(_COPY))
    return entry


def _is_needless(entry: ShardedBase, dtypes: dict[str, torch.dtype]) -> bool:
    """Whether an entry is the copy of a parameter that is fp32 itself."""
    if not entry.key.startswith(_STORED_COPY):
        return False
    return dtypes[entry.key.removeprefix(_STORED_COPY)] is torch.float32


def _set_steps(optimizer: dict[str, Any], steps: int, inner: torch.optim.Optimizer) -> None:
    """Set the step count in the state of one optimizer, where its class looks for it."""
    for holder in _holders(optimizer):
        if is_torch(inner) and "state" in holder:
            holder["state"]["common_step"] = torch.tensor(float(steps))
            continue
        for group in holder["param_groups"]:
            group["step"] = steps


def _holders(optimizer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The dictionaries with parameter groups: the optimizer's, or its inner one's."""
    if "param_groups" in optimizer:
        yield optimizer
    inner = optimizer.get("optimizer")
    if isinstance(inner, dict) and "param_groups" in inner:
        yield inner
