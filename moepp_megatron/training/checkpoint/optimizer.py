"""State of megatron-core's optimizers in a checkpoint: their steps, and a rank's own shard.

megatron-core's distributed optimizer gives each data-parallel rank a contiguous range of a flat
buffer of parameters. megatron-core stores that state either as the buffer's ranges, which only
the same layout can read (`dp_reshardable`), or by parameter, for which every rank first gathers the
state of all (`fully_reshardable`). Here each rank describes its range by parameter: a range of a
tensor's elements in memory order is a few rectangular boxes of that tensor, and the distributed
format stores any boxes that cover a tensor. So nothing is gathered, each rank writes and reads its
own bytes, and every layout can still read the checkpoint: the tensors in it are those of
`fully_reshardable`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor


def complete_state(optimizer: Any) -> None:
    """Create the state (zeros, and fp32 weights where kept) that an optimizer's first step makes.

    megatron-core 0.19.2 relies on it before, and the distributed optimizer reads values into it.
    """
    inner = optimizer.optimizer
    if inner is None:  # a rank without parameters of this optimizer
        return
    parameters = [each for group in inner.param_groups for each in group["params"]]
    # Looking one up would make an empty entry.
    without = [each for each in parameters if not inner.state.get(each)]
    if is_torch(inner):
        for parameter in without:
            inner.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    elif "emerging_optimizers" in type(inner).__module__:
        optimizer.init_state_fn(inner, optimizer.config)
    elif optimizer.config.use_precision_aware_optimizer:
        for parameter in without:
            halves = optimizer.config.store_param_remainders
            inner.initialize_state(parameter, halves and parameter.dtype is torch.bfloat16)
    elif not inner.state and is_distributed(optimizer):
        # It makes room for the state that it is to load, and leaves the values open.
        optimizer.load_state_dict(optimizer.state_dict())
        for state in inner.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()


def optimizer_steps(optimizers: list[Any]) -> int:
    """Return the optimizers' steps, without those skipped; every rank must call."""
    # A rank may hold only parameters of an optimizer that does not count.
    steps = torch.tensor(_own_steps(optimizers), device=torch.cuda.current_device())
    dist.all_reduce(steps, op=dist.ReduceOp.MAX)
    return int(steps)


def _own_steps(optimizers: list[Any]) -> int:
    for inner in (each.optimizer for each in optimizers if each.optimizer):
        for entry in inner.state.values():
            if "step" in entry:  # torch's Adam counts per parameter
                return int(entry["step"])
        for group in inner.param_groups:
            if "step" in group and group["params"]:  # fused Adam counts per group
                return int(group["step"])
    return 0


def set_steps(optimizer: Any, steps: int) -> None:
    """Set the count of one optimizer's steps, where its class looks for it."""
    inner = optimizer.optimizer
    if inner is None:
        return
    if is_torch(inner):
        for state in inner.state.values():
            state["step"] = torch.tensor(float(steps))
        return
    for group in inner.param_groups:
        group["step"] = steps


def is_distributed(optimizer: Any) -> bool:
    """True if an optimizer shards its state over data-parallel ranks."""
    return hasattr(optimizer, "gbuf_ranges")


def is_torch(inner: torch.optim.Optimizer) -> bool:
    """True if an optimizer is torch's own, as without Transformer Engine and apex."""
    return type(inner).__module__.startswith("torch.optim")


@dataclass
class _ParameterShard:
    """This rank's shard of one parameter's optimizer state."""

    parameter: torch.nn.Parameter
    entry: ShardedTensor | ShardedTensorFactory  # its entry in the model's sharded state
    begin: int  # the first of its elements, in memory order, that this rank holds
    # The optimizer's own values of these elements, flat: `param`, `exp_avg`, `exp_avg_sq`.
    tensors: dict[str, Tensor]
    # Splits `param` where the optimizer keeps two halves of it, of which it is a copy.
    put_back: Callable[[], None] = lambda: None

    def boxes(self, prefix: str, values: Tensor) -> list[ShardedTensor]:
        """Return entries named `prefix` and the parameter's key, as views of the flat `values`."""
        end = self.begin + values.numel()
        tensors = []
        for piece, offset in self._pieces():
            first = max(self.begin - offset, 0)
            last = min(end - offset, math.prod(piece.local_shape))
            lead = piece.prepend_axis_num
            for corner, sizes in _boxes(piece.local_shape, first, last):
                start = first + offset - self.begin
                first += math.prod(sizes)
                place = zip(piece.global_offset, (0,) * lead + corner, strict=True)
                local_shape = (1,) * lead + sizes
                tensors.append(
                    ShardedTensor(
                        f"{prefix}{piece.key}",
                        values.detach()[start : start + math.prod(sizes)].view(local_shape),
                        values.dtype,
                        local_shape,
                        piece.global_shape,
                        tuple(begin + step for begin, step in place),
                        axis_fragmentations=None,
                        # No other rank of the data-parallel group holds these elements.
                        replica_id=(*_model_replica(piece), 0),
                        allow_shape_mismatch=piece.allow_shape_mismatch,
                    )
                )
        return tensors

    def _pieces(self) -> list[tuple[ShardedTensor, int]]:
        """Tensors of the checkpoint that the parameter is made of, and where in it each begins."""
        if isinstance(self.entry, ShardedTensor):
            return [(self.entry, 0)]
        # Without memory: the factory slices it as it would the parameter, whatever its type.
        stand_in = torch.empty(self.parameter.shape, device="meta")
        pieces = [
            (piece, int(piece.data.storage_offset()))
            for piece in nested_values(replace(self.entry, data=stand_in).build())
        ]
        for piece, _ in pieces:
            assert piece.data.is_contiguous(), (
                f"{piece.key} is not stored as a part of its parameter"
            )
        return pieces


def _join_halves(weight: Tensor, remainder: Tensor) -> Tensor:
    """Return the fp32 weights of bf16 ones and of the int16 remainders that FusedAdam keeps."""
    # A negative remainder says that the bf16 weight was rounded up (Transformer Engine,
    # multi_tensor_adam.cu, `AdamFunctorMasterParamRemainder`).
    high = weight.detach().view(torch.int16).int() - (remainder < 0).int()
    return ((high << 16) | (remainder.int() & 0xFFFF)).view(torch.float32)


def _split_halves(whole: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """Put fp32 weights into bf16 ones and remainders, from which `_join_halves` has every bit."""
    bits = whole.view(torch.int32)
    remainder.copy_(((bits & 0xFFFF) ^ 0x8000) - 0x8000)
    weight.detach().view(torch.int16).copy_((bits >> 16) + (remainder < 0).int())


def parameter_shards(optimizer: Any, model_state: dict[str, Any]) -> Iterator[_ParameterShard]:
    """Yield this rank's shard of each parameter of a distributed optimizer with state."""
    entries = {
        entry.data: entry
        for entry in nested_values(model_state)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }
    for parameter, begin in _own_parameters(optimizer):
        yield _ParameterShard(
            parameter, entries[parameter], begin, *_own_tensors(optimizer, parameter)
        )


def copy_into_shard(optimizer: Any, parameter: Tensor, value: Tensor) -> None:
    """Copy a parameter's whole value into its shard, if any, of a distributed optimizer's state."""
    for own, begin in _own_parameters(optimizer):
        if own is parameter:
            tensors, put_back = _own_tensors(optimizer, parameter)
            shard = tensors["param"]
            shard.copy_(value.reshape(-1)[begin : begin + shard.numel()].view_as(shard))
            put_back()


def _own_parameters(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, int]]:
    """Each parameter with a shard on this rank, and the shard's first element."""
    for ranges in optimizer.gbuf_ranges:
        for bucket in (bucket for buckets in ranges.values() for bucket in buckets):
            for parameter, places in bucket["param_map"].items():
                yield parameter, places["param"].start


def _own_tensors(optimizer: Any, parameter: Tensor) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """The tensors themselves: megatron-core's own methods hand out fp32 copies of bf16 moments."""
    group, place = optimizer.model_param_group_index_map[parameter]
    inner = optimizer.optimizer
    key = inner.param_groups[group]["params"][place]
    # Torch's Adam counts its steps per parameter; they are stored once for all.
    state = {name: value for name, value in inner.state[key].items() if name != "step"}
    # FusedAdam with moments in bf16 keeps the fp32 weights too; its parameters are bf16.
    main = state.pop("master_param", key)
    if main.dtype is not torch.int16:
        return {"param": main, **state}, lambda: None
    whole = _join_halves(key, main)
    return {"param": whole, **state}, partial(_split_halves, whole, key, main)


# Corner and sizes.
_Box = tuple[tuple[int, ...], tuple[int, ...]]


def _boxes(shape: tuple[int, ...], first: int, last: int) -> list[_Box]:
    """Cover elements `first` to `last` (excluded) in memory order with boxes: corner and sizes."""
    if first >= last:
        return []
    if not shape:
        return [((), ())]
    row = math.prod(shape[1:])
    head, tail = -(-first // row), last // row
    if head > tail:  # inside of one row
        return _in_row(shape, tail, first, last)
    result = _in_row(shape, head - 1, first, head * row)
    if head < tail:
        result.append(((head,) + (0,) * (len(shape) - 1), (tail - head, *shape[1:])))
    return result + _in_row(shape, tail, tail * row, last)


def _in_row(shape: tuple[int, ...], index: int, first: int, last: int) -> list[_Box]:
    row = math.prod(shape[1:])
    inner = _boxes(shape[1:], first - index * row, last - index * row)
    return [((index, *corner), (1, *sizes)) for corner, sizes in inner]


def _model_replica(piece: ShardedTensor) -> tuple[int, ...]:
    """Replica number over the groups other than data-parallel, as in megatron-core."""
    assert isinstance(piece.replica_id, tuple), f"{piece.key} does not say its replicas by group"
    return piece.replica_id[:-1]
