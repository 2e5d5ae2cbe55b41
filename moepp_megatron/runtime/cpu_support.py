"""Lets unmodified megatron-core train on CPU ranks with gloo.

megatron-core 0.19.2 is written for CUDA: it asks for streams, events, device ordinals and CUDA
random states even where nothing depends on a GPU. `install` maps exactly the part of that surface
which training calls onto the CPU. It does nothing at all where a GPU is present, so a GPU run is
never touched. Every patch states the caller it serves.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from moepp_megatron.runtime.patches import replace

_installed = False


def install() -> bool:
    """Map the CUDA surface that megatron-core calls onto the CPU, where there is no GPU.

    Idempotent. Must run before megatron-core builds a model. False on a GPU machine.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if _installed:
        return True
    _disable_compilation()
    _patch_streams_and_events()
    _patch_device_queries()
    _patch_random_state()
    _patch_factories()
    _patch_tensor_methods()
    _patch_uneven_collectives()
    _patch_group_devices()
    _patch_megatron()
    _installed = True
    return True


def install_for_megatron_training() -> bool:
    """Same as `install`, plus what Megatron-LM's own loop, `megatron.training`, needs."""
    if not install():
        return False
    import megatron.training.arguments as arguments
    import megatron.training.training as loop

    # `validate_args` asks the driver with tensor or context parallelism; (0, 0) as above.
    replace(arguments, "get_device_arch_version", _zero)

    # `pretrain` insists on a GPU, unless this argument is given, which it does not pass on.
    replace(
        loop, "initialize_megatron", functools.partial(loop.initialize_megatron, allow_no_cuda=True)
    )
    return True


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


class _Event:
    """Stand-in for `torch.cuda.Event`: on a CPU all work is done when it is recorded."""

    __init__ = record = wait = synchronize = _nothing
    elapsed_time = _zero

    def query(self) -> bool:
        return True


class _Stream:
    """Stand-in for `torch.cuda.Stream`: a CPU rank has one in-order queue."""

    cuda_stream = 0
    __init__ = wait_stream = wait_event = synchronize = _nothing

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def _stream_context(stream: object) -> Iterator[None]:
    yield


def _disable_compilation() -> None:
    # megatron-core wraps small functions in `torch.compile`, which on a CPU would ask for a C++
    # compiler at run time and gain nothing; with this they run as written.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # The compiler keeps a table of torch's functions, which must be built before any of them is
    # replaced; torch's optimizers import that part of it.
    from torch._dynamo import trace_rules

    trace_rules.get_torch_obj_rule_map()
    # For functions that were wrapped before this call.
    torch.compiler.set_stance("force_eager")
    # Functions that are decorated from here on stay what they are: the first one that is wrapped
    # would import the code generators, about a second of every start.
    replace(torch, "compile", _uncompiled)


def _uncompiled(function: Any = None, **options: Any) -> Any:
    """Stand-in for `torch.compile`, as a call or a decorator, with or without arguments."""
    return function if function is not None else _uncompiled


def _patch_streams_and_events() -> None:
    # Token dispatcher (device-to-host stream), DDP (communication streams), pipeline
    # communication and timers create streams and events unconditionally.
    stream = _Stream()
    replace(torch.cuda, "Stream", _Stream)
    replace(torch.cuda, "Event", _Event)
    replace(torch.cuda, "current_stream", lambda *args, **kwargs: stream)
    replace(torch.cuda, "default_stream", lambda *args, **kwargs: stream)
    replace(torch.cuda, "stream", _stream_context)
    replace(torch.cuda, "is_current_stream_capturing", lambda: False)
    # `tensor_parallel.mappings` and the profiler ranges of `megatron.core.utils`.
    replace(torch.cuda.nvtx, "range_push", _nothing)
    replace(torch.cuda.nvtx, "range_pop", _nothing)


def _patch_device_queries() -> None:
    cpu = torch.device("cpu")
    # Buffers all over megatron-core are created with `device=torch.cuda.current_device()`.
    replace(torch.cuda, "current_device", lambda: cpu)
    replace(torch.cuda, "device_count", lambda: 1)
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        replace(torch.cuda, name, _nothing)
    for name in ("memory_allocated", "memory_reserved"):
        replace(torch.cuda, name, _zero)
        replace(torch.cuda, f"max_{name}", _zero)
    # Fused kernels and FP8 ask for the compute capability to decide that they do not apply;
    # (0, 0) makes every one of them decline.
    replace(torch.cuda, "get_device_capability", lambda *args, **kwargs: (0, 0))


def _get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _patch_random_state() -> None:
    # `CudaRNGStatesTracker` and activation checkpointing save and restore the CUDA generator;
    # on a CPU rank the default generator takes its place, so dropout and jitter replay exactly.
    def seed(value: int) -> None:
        torch.default_generator.manual_seed(value)

    for module in (torch.cuda, torch.cuda.random):
        replace(module, "get_rng_state", _get_state)
        replace(module, "set_rng_state", _set_state)
        replace(module, "manual_seed", seed)
        # `torch.manual_seed` calls this one after seeding the default generator itself.
        replace(module, "manual_seed_all", _nothing)


def _on_cpu(device: Any) -> Any:
    """The device to use instead of `device`: CUDA devices in any spelling become the CPU."""
    is_cuda = isinstance(device, (str, torch.device)) and str(device).startswith("cuda")
    return torch.device("cpu") if is_cuda else device


def _redirected(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        # Rotary embeddings pin the indices of a context-parallel rank's positions
        # (rope_utils.py, `get_pos_emb_on_this_cp_rank`); only memory for a GPU can be pinned.
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return call


def _patch_factories() -> None:
    # `with torch.device(...)` keeps a set of the factories that it acts on, made when it is first
    # used: with those below in it, it would know none of torch's own, and transformers would leave
    # the frequencies of rotary embeddings uninitialised.
    with torch.device("cpu"):
        torch.empty(0)
    # Schedules, gradient clipping, scalers and attention masks write `device="cuda"` literally.
    # Wrapping the factories costs nothing elsewhere; a global TorchFunctionMode would add Python
    # time to every operation of a step.
    of_values = "full tensor as_tensor arange rand randn randint"
    for name in f"empty empty_like zeros zeros_like ones ones_like {of_values}".split():
        replace(torch, name, _redirected(getattr(torch, name)))


def _patch_tensor_methods() -> None:
    original_to = torch.Tensor.to
    original_type = torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and not isinstance(args[0], (torch.dtype, torch.Tensor)):
            args = (_on_cpu(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return original_to(self, *args, **kwargs)

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Both optimizers sort parameters by the strings "torch.cuda.FloatTensor" and
        # "torch.cuda.BFloat16Tensor" (optimizer.py, distrib_optimizer.py, clip_grads.py).
        result = original_type(self, *args, **kwargs)
        if isinstance(result, str) and not result.startswith("torch.cuda."):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    replace(torch.Tensor, "to", to)
    replace(torch.Tensor, "cuda", cuda)
    replace(torch.Tensor, "type", type_)
    replace(torch.Tensor, "record_stream", _nothing)


def _patch_group_devices() -> None:
    # megatron-core makes dozens of groups, and torch makes a gloo device for each of them, whose
    # thread wakes up a hundred times a second whether or not the group is used. One is enough:
    # a device serves any number of groups.
    group_class: Any = dist.ProcessGroupGloo
    original = group_class.__init__

    def with_shared_devices(
        self: Any, store: Any, rank: int, size: int, *options: Any, **named: Any
    ) -> None:
        if "timeout" not in named:
            # With options of the caller's, devices among them.
            original(self, store, rank, size, *options, **named)
            return
        # A fork does not have the threads of its parent's devices.
        devices = _gloo_devices(os.getpid())
        chosen = group_class._Options()
        chosen._devices = devices
        chosen._threads = 2 * len(devices)
        chosen._timeout = named.pop("timeout")
        if "enable_reconfigure" in named:
            chosen.enable_reconfigure = named.pop("enable_reconfigure")
        original(self, store, rank, size, *options, chosen, **named)

    replace(group_class, "__init__", with_shared_devices)


@functools.cache
def _gloo_devices(process: int) -> list[Any]:
    """A process's devices, made as torch makes them for each group: one per network interface."""
    names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    make = dist.ProcessGroupGloo
    if not names:
        return [make.create_default_device()]
    return [make.create_device(interface=name) for name in names]


def _patch_uneven_collectives() -> None:
    # Expert tensor parallelism gathers and reduce-scatters a different number of tokens from every
    # rank (`tensor_parallel.mappings`). NCCL takes lists of unequal tensors, gloo does not.
    original_gather, original_scatter = dist.all_gather, dist.reduce_scatter

    def all_gather(
        outputs: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, **kwargs: Any
    ) -> Any:
        rows = [output.shape[0] if output.dim() else 1 for output in outputs]
        if len(set(rows)) == 1:
            return original_gather(outputs, tensor, group=group, **kwargs)
        padded = tensor.new_zeros(max(rows), *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
        gathered = [torch.empty_like(padded) for _ in outputs]
        original_gather(gathered, padded, group=group)
        for output, full in zip(outputs, gathered, strict=True):
            output.copy_(full[: output.shape[0]])
        return None

    def reduce_scatter(
        output: torch.Tensor, inputs: list[torch.Tensor], group: Any = None, **kwargs: Any
    ) -> Any:
        if len({tensor.shape[0] if tensor.dim() else 1 for tensor in inputs}) == 1:
            return original_scatter(output, inputs, group=group, **kwargs)
        assert not kwargs, f"uneven reduce_scatter knows the sum only, not {sorted(kwargs)}"
        total = torch.cat(inputs)
        dist.all_reduce(total, group=group)
        output.copy_(total.split([t.shape[0] for t in inputs])[dist.get_rank(group)])
        return None

    replace(dist, "all_gather", all_gather)
    replace(dist, "reduce_scatter", reduce_scatter)


def _patch_megatron() -> None:
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    # Their originals go through `torch.cuda.default_generators`, which is empty without a GPU.
    replace(megatron_random, "_get_cuda_rng_state", _get_state)
    replace(megatron_random, "_set_cuda_rng_state", _set_state)

    # On a GPU this moves the all-to-all's split sizes to the host as numpy arrays. On a CPU the
    # original returns them as tensors, which `all_to_all_single` does not take.
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    replace(token_dispatcher, "maybe_move_tensor_to_cpu", move)

    # Ranks that share out the reading of a checkpoint receive on a GPU, in tensors of a factory
    # that megatron-core has remembered from before it was wrapped (exchange_utils.py).
    original_data = ShardedTensor.init_data

    def init_data(self: Any, device: Any, *args: Any, **kwargs: Any) -> None:
        original_data(self, _on_cpu(device), *args, **kwargs)

    replace(ShardedTensor, "init_data", init_data)
