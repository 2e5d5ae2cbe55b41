"""The machine of a played run: fake tensors on a fake GPU, peers that do not exist, and a record.

Every tensor is a `FakeTensor`: it has a shape, a dtype and a device and no numbers, so a step of
any size costs little. What would need numbers is answered as balanced routing would answer it.
Recorded are reads that make the host wait for the device, launches of Triton kernels, collectives,
and faults: arguments on the wrong device or not contiguous. `FakeTensorMode` itself raises where
shapes or devices do not fit.

`install` must run before megatron-core is imported, which keeps torch's collectives by name.
"""

import contextlib

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.fake_gpu.memory import MEMORY
from tests.fake_gpu.record import RECORD, ROUTING, owner

aten = torch.ops.aten


# Operations that look at numbers to know the size of their result: they wait for the device.
_SIZED_BY_NUMBERS = (
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
)
# Of torch's operations those that start no kernel: names begin so.
_NO_KERNEL = (
    "view",
    "_unsafe_view",
    "t.",
    "transpose",
    "permute",
    "expand",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "detach",
    "alias",
    "as_strided",
    "split",
    "unbind",
    "empty",
    "new_empty",
    "narrow",
    "is_same_size",
    "device.",
    "set_",
    "lift_fresh",
    "_reshape_alias",
    "unfold",
    "chunk",
)


class Device(TorchDispatchMode):
    """Sees every operation; stands above `FakeTensorMode`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = next((each for each in args if isinstance(each, torch.Tensor)), None)
        on_gpu = first is not None and first.device.type == "cuda"
        if func is aten._local_scalar_dense.default:
            if on_gpu:
                RECORD.read("item")
            constant = getattr(first, "constant", None)
            return _number(first) if constant is None else constant.item()
        if func in _SIZED_BY_NUMBERS and on_gpu:
            RECORD.read(func.__name__.partition(".")[0])
            return _sized(func, first, args, kwargs)
        if func is aten.index.Tensor and any(_is_mask(each) for each in args[1]):
            RECORD.read("index by a mask")
            return _indexed(*args)
        if func is aten._pin_memory.default:
            func = aten.clone.default
        result = func(*args, **kwargs)
        MEMORY.see(result)
        if func is aten._to_copy.default:
            _note_copy(first, result, bool(kwargs.get("non_blocking", False)))
        elif func is aten.copy_.default:
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            _note_copy(args[1], args[0], not waits)
        if not func.__name__.startswith(_NO_KERNEL) and (on_gpu or _is_on_gpu(result)):
            RECORD.operations[func.__name__] += 1
            RECORD.owners[owner()] += 1
        return result


def _is_on_gpu(result):
    """Of what an operation without a tensor before its other arguments has made or changed."""
    first = next((each for each in tree_leaves(result) if isinstance(each, torch.Tensor)), None)
    return first is not None and first.device.type == "cuda"


def _note_copy(source, target, non_blocking):
    kinds = (source.device.type, target.device.type)
    if non_blocking or kinds[0] == kinds[1]:
        return
    if kinds == ("cuda", "cpu"):
        RECORD.read("copy to the host")
    if kinds == ("cpu", "cuda"):
        RECORD.read("copy to the device")


def _is_mask(index):
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def _number(tensor):
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else ROUTING.counted


def _sized(func, first, args, kwargs):
    if func is aten.bincount.default:
        least = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
        return first.new_zeros(least)
    if func is aten.masked_select.default:
        mask = args[1]
        # [experts, tokens], as megatron-core permutes; tokens are those of whole ranks, or copies.
        sources, rest = divmod(mask.shape[1], ROUTING.tokens)
        rows = int(ROUTING.share * mask.shape[1]) if rest else ROUTING.rows * sources
        return first.new_zeros(mask.shape[0] * max(1, rows))
    raise NotImplementedError(f"no answer for {func}")


def _indexed(values, indices):
    """Values at a mask: as many as half of the mask's entries, of a mask of all leading axes."""
    (mask,) = indices
    assert mask is not None
    return values.new_zeros(max(1, mask.numel() // 2), *values.shape[mask.dim() :])


def install():
    """Replace what would need a device, peers or numbers; for the whole process."""
    _install_reads()
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    def run(self, *args, grid=None, warmup=False, **kwargs):
        name = self.fn.__name__
        RECORD.launches[name] += 1
        RECORD.owners[owner()] += 1
        for number, value in enumerate(args):
            if isinstance(value, torch.Tensor) and value.device.type != "cuda":
                RECORD.faults.append(f"kernel {name}: argument {number} is on {value.device}")

    JITFunction.run = run
    Autotuner.run = lambda self, *args, **kwargs: self.fn.run(*args, **kwargs)
    # The autograd engine asks whether it has to start the device; it must, for its threads.
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    resize = torch.UntypedStorage.resize_

    def resized(self, size):
        resize(self, size)
        MEMORY.resized(self)
        return self

    torch.UntypedStorage.resize_ = resized
    dispatch = FakeTensor.__torch_dispatch__

    def dispatched(cls, func, types, args=(), kwargs=None):
        # Transformer Engine's tensors hand on what is to be done with the data that they hold.
        if set(types) - {type(each) for each in tree_leaves((args, kwargs))}:
            return func(*args, **kwargs or {})
        return dispatch(func, types, args, kwargs)

    FakeTensor.__torch_dispatch__ = classmethod(dispatched)
    save = torch.save

    def saved(value, *args, **kwargs):
        with unset_fake_temporarily():
            save(tree_map_only(FakeTensor, _zeros, value), *args, **kwargs)

    torch.save = saved
    # Storage of a fake tensor is on no stream.
    for kind in (torch.Tensor, FakeTensor):
        kind.record_stream = lambda self, stream: None


def keep_dtypes():
    """megatron-core makes a model bf16 by this, and Transformer Engine has its own; parameters are.

    After Transformer Engine has been imported.
    """
    torch.nn.Module.bfloat16 = lambda self: self


def _zeros(tensor):
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def _install_reads():
    """Reads that never become an operation, or whose copy torch makes below Python."""
    to_list = torch.Tensor.tolist

    def tolist(self):
        if not isinstance(self, FakeTensor):
            return to_list(self)
        if self.is_cuda:
            RECORD.read("tolist")
        if (values := getattr(self, "made_of", None)) is not None:
            return list(values)
        return _listed(tuple(self.shape), self.is_floating_point())

    torch.Tensor.tolist = FakeTensor.tolist = tolist
    torch.Tensor.__index__ = lambda self: int(self)
    to_numpy = torch.Tensor.numpy

    def numpy(self, **kwargs):
        """Of a tensor on the host; what has brought it there was the read."""
        if not isinstance(self, FakeTensor):
            return to_numpy(self, **kwargs)
        return np.ones(tuple(self.shape), dtype=str(self.dtype).removeprefix("torch."))

    torch.Tensor.numpy = FakeTensor.numpy = numpy
    are_equal = torch.equal

    def equal(first, second):
        if not isinstance(first, FakeTensor):
            return are_equal(first, second)
        if first.is_cuda:
            RECORD.read("equal")
        return False

    torch.equal = equal
    make, make_new = torch.tensor, torch.Tensor.new_tensor

    def tensor(data, **kwargs):
        kwargs.pop("pin_memory", None)
        result = make(_plain(data), **kwargs)
        if str(kwargs.get("device", "cpu")) == "cpu" and isinstance(data, list | tuple):
            # What the host has written it can read again.
            result.made_of = data
        return result

    def new_tensor(self, data, **kwargs):
        if self.is_cuda:
            RECORD.read("copy to the device")
        return make_new(self, data, **kwargs)

    torch.tensor, torch.Tensor.new_tensor = tensor, new_tensor
    for waits in (torch.cuda, torch.cuda.Event, torch.cuda.Stream):
        _count_synchronize(waits)


def _plain(data):
    """Lists of tensors, each of which torch would read."""
    if isinstance(data, list | tuple):
        return [_plain(each) for each in data]
    return float(data) if isinstance(data, torch.Tensor) else data


def _count_synchronize(owner):
    original = owner.synchronize

    def synchronize(*args, **kwargs):
        RECORD.read("synchronize")
        return original(*args, **kwargs)

    owner.synchronize = synchronize


def _listed(shape, is_float):
    if not shape:
        return 1.0 if is_float else ROUTING.counted
    if len(shape) > 1:
        return [_listed(shape[1:], is_float) for _ in range(shape[0])]
    if is_float:
        # Loss, tokens, and ranks whose numbers are not sound (resilience/numerical_guard.py).
        return [1.0, 1.0, 0.0] if shape == (3,) else [1.0] * shape[0]
    if shape[0] == ROUTING.local_experts:
        # Of each expert of the rank, from all ranks.
        return [ROUTING.rows * ROUTING.sources] * shape[0]
    # Of each expert of the rank, from each rank.
    return [ROUTING.rows] * shape[0]


def fake_mode():
    """The modes of a played run."""
    stack = contextlib.ExitStack()
    stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
    stack.enter_context(Device())
    return stack
