"""Model, optimizer and schedule as megatron-core's sharded state, the same for every layout.

The names in a checkpoint do not depend on who wrote it:

- Optimizer state is stored per parameter (`optimizer.state.exp_avg.<parameter>`), not per bucket.
  Each rank of a distributed optimizer describes its own shard so; nothing is gathered.
- The fp32 copy of a bf16 parameter is `optimizer.state.fp32_param.<parameter>` whichever optimizer
  keeps it. An fp32 parameter needs no copy, so none is stored.
- FP8 weights are stored as bf16 ones are.
- Nothing else of the optimizer is stored but the number of its steps. Its parameter groups differ
  between layouts (expert parameters have their own optimizer only where experts are spread over
  ranks), and all that they hold follows from the configuration and the schedule.
"""

import importlib.util
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from megatron.core.safe_globals import SafeUnpickler
from torch import Tensor

from moepp_megatron.config import ConfigError
from moepp_megatron.model.gpt import MoEPPGPTModel
from moepp_megatron.runtime.rank import environment
from moepp_megatron.training.checkpoint.data_only import only_data
from moepp_megatron.training.checkpoint.optimizer import (
    complete_state,
    is_distributed,
    is_torch,
    optimizer_steps,
    parameter_shards,
    set_steps,
)
from moepp_megatron.training.checkpoint.plain_pickle import read_plain
from moepp_megatron.training.setup import TrainingModel

METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
_STATE = "optimizer.state."
# What the distributed optimizer calls the fp32 copy, and the other one, whose name is kept.
_COPY, _STORED_COPY = f"{_STATE}param.", f"{_STATE}fp32_param."
_PUT_BACK = "put_back"
_ALLOW_PICKLES = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def model_state(models: list[MoEPPGPTModel]) -> dict[str, Any]:
    """Sharded state of this rank's model chunks."""
    return {
        f"model{index}": model.sharded_state_dict(metadata=dict(METADATA))
        for index, model in enumerate(models)
    }


def saved_state(model: TrainingModel) -> dict[str, Any]:
    """The state of model, optimizer and schedule that a checkpoint stores."""
    # First, since ranks wait for each other in it, and what follows may fail on one.
    steps = optimizer_steps(model.optimizers)
    state = model_state(model.models)
    if _keeps_shards(model):
        state["optimizer"], _ = _shard_entries(model, state)
    else:
        dtypes = _dtypes(state)
        optimizer = _whole_optimizer_state(model, state, is_loading=False)
        state["optimizer"] = _without_copies(optimizer, dtypes)
    state["optimizer_steps"] = steps
    state["schedule_steps"] = model.scheduler.num_steps
    # Read back in any precision, and without Transformer Engine. Last, because the optimizer knows
    # the weights that it holds state of as objects.
    force_all_tensors_to_non_fp8(state)
    return state


def state_to_load(model: TrainingModel) -> dict[str, Any]:
    """Return the state to read: like `saved_state`, without entries that only this layout has."""
    state = model_state(model.models)
    if _keeps_shards(model):
        # Read into the optimizer's own tensors, without a copy between.
        state["optimizer"], put_back = _shard_entries(model, state)
        state[_PUT_BACK] = LocalNonpersistentObject(put_back)
        return state
    dtypes = _dtypes(state)
    optimizer = _whole_optimizer_state(model, state, is_loading=True)

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
    steps = loaded["optimizer_steps"]
    if _keeps_shards(model):
        # Their values are in place, but for those that the optimizer keeps in two halves.
        for put_back in loaded[_PUT_BACK]:
            put_back()
        for chained in model.optimizers:
            set_steps(chained, steps)
    else:
        state, optimizers = loaded["optimizer"], model.optimizers
        parts = [state] if len(optimizers) == 1 else [state[i] for i in range(len(optimizers))]
        for part, chained in zip(parts, optimizers, strict=True):
            _set_steps(part, steps, chained.optimizer)
        model.optimizer.load_state_dict(state)
    # Its own load_state_dict would insist on the schedule that the checkpoint was written with.
    model.scheduler.num_steps = 0
    model.scheduler.step(increment=loaded["schedule_steps"])


def apply_model_state(models: list[MoEPPGPTModel], loaded: dict[str, Any]) -> None:
    """Put the state that was read into the model."""
    for index, model in enumerate(models):
        state = loaded[f"model{index}"]
        with _checked_fp8_state(state):
            model.load_state_dict(state)


def _keeps_shards(model: TrainingModel) -> bool:
    """True if the optimizer's state is sharded over data-parallel ranks."""
    return any(is_distributed(chained) for chained in model.optimizers)


def _shard_entries(
    model: TrainingModel, state: dict[str, Any]
) -> tuple[list[ShardedTensor], list[Callable[[], None]]]:
    """Views of this rank's shards of optimizer state, and functions that copy back."""
    entries, put_back = [], []
    for chained in filter(is_distributed, model.optimizers):
        complete_state(chained)
        for shard in parameter_shards(chained, state):
            put_back.append(shard.put_back)
            for name, values in shard.tensors.items():
                key = f"{_STATE}{name}."
                if key != _COPY:
                    entries += shard.boxes(key, values)
                elif shard.parameter.dtype is not torch.float32:
                    entries += shard.boxes(_STORED_COPY, values)
    return entries, put_back


def _whole_optimizer_state(model: TrainingModel, state: dict[str, Any], is_loading: bool) -> Any:
    tensors = {
        f"{chunk}.{key}": tensor
        for chunk, chunk_state in state.items()
        for key, tensor in chunk_state.items()
    }
    for chained in model.optimizers:
        complete_state(chained)
    return model.optimizer.sharded_state_dict(
        tensors, is_loading=is_loading, metadata=dict(METADATA)
    )


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
    """True if an entry is the copy of a parameter that is fp32 itself."""
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


@contextmanager
def _checked_fp8_state(state: dict[str, Any]) -> Iterator[None]:
    """Let Transformer Engine read a model's FP8 state in the block; ConfigError if it is unsafe."""
    # Transformer Engine refuses to read such a pickle unless a variable of the environment allows
    # it for the whole process (its `_extra_state.py`, from 2.20 at the latest), because a crafted
    # one could run code. So each is looked at first: it may name only what a history of delayed
    # scaling is made of, by literal names, and change only objects that it made itself, so that a
    # second reading does what the first one did. What megatron-core's unpickler accepts then,
    # Transformer Engine may read, while `torch.load` takes the tensors inside as data. Other
    # recipes store nothing. Without Transformer Engine nobody reads them.
    is_read = importlib.util.find_spec("transformer_engine") is not None
    pickles = {
        name: value
        for name, value in state.items()
        if is_read and "_extra_state" in name and not _is_empty(value)
    }
    for name, value in pickles.items():
        _refuse_unsafe(name, value)
    if not pickles:
        yield
        return
    with environment(**{_ALLOW_PICKLES: "1"}), only_data():
        yield


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, Tensor) and value.numel() == 0)


def _refuse_unsafe(name: str, value: Any) -> None:
    try:
        if not isinstance(value, Tensor):
            raise TypeError(f"a {type(value).__name__}, not bytes in a tensor")
        # The very bytes that Transformer Engine takes, whatever the tensor's type.
        content = value.detach().cpu().numpy().tobytes()
        # What makes a tensor of a subclass calls what it is given.
        read_plain(content, lambda name: name.module != "torch._tensor" and "." not in name.name)
        with only_data():
            SafeUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # whatever crafted or damaged bytes make an unpickler do
        # torch explains at length how to read it all the same.
        reason = str(error).split(". ")[0]
        raise ConfigError(
            f"checkpoint entry {name} must hold the history of delayed FP8 scaling and nothing "
            f"else ({reason}); load another checkpoint"
        ) from error
