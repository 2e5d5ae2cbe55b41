"""Weights in FP8: bytes and one scale behind the shape and dtype of the plain tensor."""

from types import MethodType

import torch

_E4M3 = torch.float8_e4m3fn


class QuantizedTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, data, scale_inv, dtype):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, data.shape, dtype=dtype, device=data.device, requires_grad=False
        )
        tensor._data, tensor._scale_inv = data, scale_inv
        return tensor

    @classmethod
    def of(cls, plain):
        tensor = cls(torch.empty_like(plain, dtype=torch.uint8), torch.ones(1), plain.dtype)
        tensor.quantize_(plain)
        return tensor

    def quantize_(self, plain):
        assert self.shape == plain.shape, "all values share a scale, so all are written at once"
        scale_inv = scale_of(plain)
        self._scale_inv.copy_(scale_inv)
        self._data.copy_((plain.float() / scale_inv).to(_E4M3).view(torch.uint8))
        return self

    def dequantize(self):
        return (self._data.view(_E4M3).float() * self._scale_inv).to(self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.alias.default):
            source = args[0]
            return type(source)(source._data, source._scale_inv, source.dtype)
        if func is aten.copy_.default and isinstance(args[0], QuantizedTensor):
            return args[0].quantize_(plain_of(args[1]))
        name = func._schema.name.rsplit("::")[-1]
        if name.endswith("_") and isinstance(args[0], QuantizedTensor):
            raise NotImplementedError(f"{name} on an FP8 weight")
        args, kwargs = torch.utils._pytree.tree_map(plain_of, (args, kwargs or {}))
        return func(*args, **kwargs)


class Float8Tensor(QuantizedTensor):
    pass


class Float8BlockwiseQTensor(QuantizedTensor):
    pass


def plain_of(value):
    return value.dequantize() if isinstance(value, QuantizedTensor) else value


def scale_of(plain):
    largest = plain.detach().abs().max().float().clamp_min(1e-12) if plain.numel() else 1.0
    return torch.as_tensor(largest / 448.0).reshape(1)


def attach_high_precision_init_val(parameter, value):
    def get(self):
        return getattr(self, "_high_precision_init_val", None)

    def clear(self):
        if hasattr(self, "_high_precision_init_val"):
            del self._high_precision_init_val

    parameter._high_precision_init_val = value
    parameter.get_high_precision_init_val = MethodType(get, parameter)
    parameter.clear_high_precision_init_val = MethodType(clear, parameter)
