"""Shared by every module with weights: FP8 weights, contexts, and state in checkpoints."""

import os
import pickle
from collections import deque

import torch
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from transformer_engine.pytorch.record import CALLS, Call
from transformer_engine.pytorch.tensor import (
    Float8BlockwiseQTensor,
    Float8Tensor,
    attach_high_precision_init_val,
    plain_of,
)


def get_dummy_wgrad(shape, dtype, zero=False):
    # Not initialised memory, made visible.
    return torch.full(shape, 0.0 if zero else float("nan"), dtype=dtype)


class TransformerEngineBaseModule(torch.nn.Module):
    num_gemms = 1
    parallel_mode = None

    def __init__(self, bias, name, delay_wgrad_compute):
        super().__init__()
        assert not bias, "the stand-in knows no bias"
        self.use_bias = bias
        # What is needed for the gradients of weights, until `backward_dw`.
        self.delayed = deque() if delay_wgrad_compute else None
        self.wgrad_accumulation_and_reduce_hooks = []
        self.name = name
        # megatron-core's setting, which the constructors get, needs apex, and is off here.
        self.fuse_wgrad_accumulation = False
        self.fp8 = False
        self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}
        self.primary_weights_in_fp8 = FP8GlobalStateManager.with_fp8_parameters()
        self.keeps_init_val = FP8GlobalStateManager.with_high_precision_init_val()

    def set_tensor_parallel_group(self, tp_group):
        self.tp_group = tp_group

    def add_weight(self, name, rows, columns, dtype, device, init_method):
        weight = torch.empty(rows, columns, dtype=dtype, device=device)
        if init_method is None:
            torch.nn.init.normal_(weight, std=0.023)
        else:
            # Not initialised memory, made visible.
            init_method(weight.fill_(float("nan")))
        if not self.primary_weights_in_fp8:
            self.register_weight(name, torch.nn.Parameter(weight))
            return
        assert weight.isfinite().all(), "uninitialised memory would be quantised"
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        kind = Float8BlockwiseQTensor if recipe.float8_block_scaling() else Float8Tensor
        parameter = torch.nn.Parameter(kind.of(weight))
        if self.keeps_init_val:
            attach_high_precision_init_val(parameter, weight.detach().cpu())
        self.register_weight(name, parameter)

    def register_weight(self, name, parameter):
        self.register_parameter(name, parameter)
        # As `reset_parameters` of every linear layer: megatron-core's gradient norm counts what is
        # not marked on only one tensor-parallel rank.
        parameter.tensor_model_parallel = True
        parameter.partition_dim = 1 if self.parallel_mode == "row" else 0
        parameter.partition_stride = 1
        if self.delayed is not None:
            parameter.skip_backward_post_hook = True

    def register_wgrad_accumulation_and_reduce_hooks(self, wgrad_accumulation_and_reduce_hook):
        self.wgrad_accumulation_and_reduce_hooks.append(wgrad_accumulation_and_reduce_hook)

    @torch.no_grad()
    def backward_dw(self):
        """The gradients of the weights of the oldest pass that they are left out of."""
        if self.delayed is None:
            return
        if not self.delayed:
            raise RuntimeError("Pop empty queue")
        for _ in range(self.num_gemms):
            weight, adds_to, grad, x = self.delayed.popleft()
            if adds_to is None:
                weight.grad = grad.T @ x
            else:
                _add_product(adds_to, grad, x)
        for hook in self.wgrad_accumulation_and_reduce_hooks:
            hook()

    def init_fp8_metadata(self, num_gemms=1):
        self.fp8 = FP8GlobalStateManager.is_fp8_enabled()
        self.fp8_meta["fp8_checkpoint"] = self.fp8
        if not self.fp8:
            return
        recipe = self.fp8_meta["recipe"] = FP8GlobalStateManager.get_fp8_recipe()
        self.fp8_meta["num_gemms"] = num_gemms
        if recipe.delayed() and "scale_fwd" not in self.fp8_meta:
            for suffix, tensors in (("fwd", 3), ("bwd", 2)):
                count, length = tensors * num_gemms, recipe.amax_history_len
                self.fp8_meta[f"scale_{suffix}"] = torch.ones(count)
                self.fp8_meta[f"amax_history_{suffix}"] = torch.zeros(length, count)

    def begin(self, inp, rows):
        for weight in self.parameters(recurse=False):
            # megatron-core's subclasses give the forward pass the second.
            weight.adds_to = (
                (weight.main_grad, getattr(self, "is_first_microbatch", None))
                if self.fuse_wgrad_accumulation
                else None
            )
            weight.delayed = self.delayed
        self.init_fp8_metadata(self.num_gemms)
        recipe = type(self.fp8_meta["recipe"]).__name__ if self.fp8 else None
        CALLS.append(Call(type(self).__name__, tuple(rows), recipe))
        if self.fp8 and "amax_history_fwd" in self.fp8_meta and inp.numel():
            self.fp8_meta["amax_history_fwd"][0, 0] = inp.detach().abs().max()

    def get_extra_state(self):
        recipe = self.fp8_meta.get("recipe")
        if not self.fp8_meta["fp8_checkpoint"] or not recipe.delayed():
            return torch.empty(0, dtype=torch.uint8)
        names = ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")
        state = {name: self.fp8_meta[name] for name in names}
        state |= {"recipe": recipe, "extra_fp8_variables": {"num_gemms": self.num_gemms}}
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)

    def set_extra_state(self, state):
        if state is None or state.numel() == 0:
            return
        if os.getenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "0") != "1":
            raise RuntimeError("Refusing to load pickled Transformer Engine extra state")
        state = pickle.loads(state.numpy().tobytes())
        self.fp8_meta.update(state.pop("extra_fp8_variables"))
        self.fp8_meta.update(state)


def needs_fp8_sizes(*tensors):
    for tensor in tensors:
        *leading, last = tensor.shape
        if torch.Size(leading).numel() % 8 or last % 16:
            raise ValueError(
                f"FP8 execution requires sizes divisible by 8 and 16, got {[*leading, last]}"
            )


class _Gemm(torch.autograd.Function):
    """y = x w^T, with FP8 operands where `fp8`; rows of all ranks of `group` where there is one.

    The rank's own rows are kept, and gathered once more in the backward pass.
    """

    @staticmethod
    def forward(ctx, x, weight, fp8, group):
        ctx.fp8, ctx.group = fp8, group
        ctx.weight, ctx.adds_to, ctx.delayed = weight, weight.adds_to, weight.delayed
        w = plain_of(weight)
        # As cuBLAS: operands of one type.
        assert x.dtype == w.dtype, f"operands in {x.dtype} and {w.dtype}"
        if fp8:
            x, w = _rounded(x, torch.float8_e4m3fn), _rounded(w, torch.float8_e4m3fn)
        ctx.save_for_backward(x, w)
        return _gathered(x, group) @ w.T

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        assert grad.dtype == w.dtype, f"operands in {grad.dtype} and {w.dtype}"
        if ctx.fp8:
            grad = _rounded(grad, torch.float8_e5m2)
        own = grad @ w
        if ctx.group is not None:
            from megatron.core.tensor_parallel import mappings

            own = mappings._reduce_scatter_along_first_dim(own, ctx.group)
        return own, _weight_gradient(ctx, grad, _gathered(x, ctx.group)), None, None


def _add_product(adds_to, grad, x):
    # Added inside the product, in fp32; the first of a step begins the sum.
    sums, is_first = adds_to
    product = grad.T.float() @ x.float()
    sums.copy_(product) if is_first else sums.add_(product)


def _weight_gradient(ctx, grad, x):
    if ctx.delayed is not None:
        ctx.delayed.append((ctx.weight, ctx.adds_to, grad, x))
    elif ctx.adds_to is None:
        return grad.T @ x
    else:
        _add_product(ctx.adds_to, grad, x)
    if ctx.adds_to is None:
        return None
    ctx.weight.grad_added_to_main_grad = True
    return get_dummy_wgrad(ctx.weight.shape, x.dtype, getattr(ctx.weight, "zero_out_wgrad", False))


def _gathered(x, group):
    if group is None:
        return x
    from megatron.core.tensor_parallel import mappings

    return mappings._gather_along_first_dim(x, group)


def gemm(x, weight, fp8, group=None):
    rows = _Gemm.apply(x.reshape(-1, x.shape[-1]), weight, fp8, group)
    ranks = 1 if group is None else group.size()
    return rows.view(ranks * x.shape[0], *x.shape[1:-1], weight.shape[0])


def _rounded(tensor, fp8_dtype):
    if not tensor.numel():
        return tensor
    largest = tensor.abs().max().float().clamp_min(1e-12)
    scale = torch.finfo(fp8_dtype).max / largest
    return ((tensor.float() * scale).to(fp8_dtype).float() / scale).to(tensor.dtype)
