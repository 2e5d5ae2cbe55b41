"""What each function of Transformer Engine's extension returns: shapes and dtypes, no numbers.

Checks are those of its C++ code (gemm.cpp, normalization.cpp, cast.cpp, padding.cpp), and of the
matrix products of cuBLAS on Hopper. Arguments have the names of its source; what a function does
not name, it does not look at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.fake_gpu.engine import gemm

FUNCTIONS: dict[str, Callable[..., Any]] = {}
# Those that answer on the host, and start no kernel.
HOST: set[str] = set()


def _function(function: Callable[..., Any]) -> Callable[..., Any]:
    FUNCTIONS[function.__name__] = function
    return function


def _on_host(name: str, value: Any) -> None:
    FUNCTIONS[name] = lambda: value
    HOST.add(name)


_on_host("get_cublasLt_version", 130500)
_on_host("get_cudnn_version", 92600)
_on_host("get_num_cublas_streams", 4)
_on_host("ubuf_built_with_mpi", False)
_on_host("device_supports_multicast", True)
_on_host("get_stream_priority_range", (0, -5))


def _new(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="cuda")


def _made(shape: Sequence[int], dtype: torch.dtype, quantizer: Any) -> Any:
    if quantizer is None:
        return _new(shape, dtype)
    return quantizer.make_empty(list(shape), dtype=dtype, device=torch.device("cuda"))


@_function
def generic_gemm(
    A: Any, transA: bool, B: Any, transB: bool, D: Any, quantizer: Any, output_dtype: Any,
    bias: Any, grad: bool, accumulate: bool, extra_output: Any = None, beta: Any = None,
) -> list[Any]:  # fmt: skip
    shape = gemm.output_shape(A, transA, B, transB)
    assert accumulate or not beta, "beta without accumulation"
    dtype = gemm.output_dtype(A, output_dtype)
    if D is None:
        D = _made(shape, dtype, quantizer)
    else:
        gemm.check_output(D, shape, output_dtype)
    of_bias = _new(gemm.size(B)[-1:], dtype) if bias is not None and grad else None
    return [D, of_bias, None, extra_output]


@_function
def te_general_grouped_gemm(
    A: list[Any], transa: bool, B: list[Any], transb: bool, D: list[torch.Tensor] | None,
    D_type: Any, m_splits: list[int], bias: list[torch.Tensor], single_output: bool,
    workspace: list[torch.Tensor],
) -> list[torch.Tensor]:  # fmt: skip
    assert len(A) == len(B) == len(bias), (len(A), len(B), len(bias))
    assert D is not None or not single_output, "D should be allocated for a single output"
    assert len(workspace) == 4, "one workspace a stream"
    if m_splits:
        rows = [gemm.size(each)[0] for each in B]
        assert rows == m_splits, f"rows of the products {rows}, m_splits {m_splits}"
    shapes = [gemm.output_shape(a, transa, b, transb) for a, b in zip(A, B, strict=True)]
    if D is None:
        return bias
    if single_output:
        elements = sum(math.prod(shape) for shape in shapes)
        assert elements == D[0].numel(), f"{elements} elements into {tuple(D[0].shape)}"
        assert D[0].is_contiguous(), "output of the products is not contiguous"
        assert D[0].dtype == gemm.torch_dtype(D_type)
    else:
        for output, shape in zip(D, shapes, strict=True):
            gemm.check_output(output, shape, D_type)
    return bias


def _norm(
    input: torch.Tensor, weight: torch.Tensor, ln_out: Any, quantizer: Any, otype: Any
) -> list[Any]:
    assert weight.shape == input.shape[-1:], f"{tuple(weight.shape)} for {tuple(input.shape)}"
    if ln_out is None:
        ln_out = _made(input.shape, gemm.torch_dtype(otype), quantizer)
    rows = input.shape[:-1].numel()
    return [ln_out, _new([rows], torch.float32), _new([rows], torch.float32)]


@_function
def layernorm_fwd(input: Any, weight: Any, ln_out: Any, quantizer: Any, otype: Any) -> list[Any]:
    return _norm(input, weight, ln_out, quantizer, otype)


@_function
def rmsnorm_fwd(input: Any, weight: Any, ln_out: Any, quantizer: Any, otype: Any) -> list[Any]:
    output, _, rsigma = _norm(input, weight, ln_out, quantizer, otype)
    return [output, None, rsigma]


def _norm_gradients(dz: torch.Tensor, x: torch.Tensor, *parameters: torch.Tensor) -> list[Any]:
    assert dz.shape == x.shape, f"{tuple(dz.shape)} for {tuple(x.shape)}"
    return [_new(x.shape, x.dtype), *(_new(each.shape, each.dtype) for each in parameters)]


@_function
def rmsnorm_bwd(dz: Any, x: Any, gamma: Any) -> list[Any]:
    return _norm_gradients(dz, x, gamma)


@_function
def rmsnorm_bwd_add(dz: Any, x: Any, add: Any, gamma: Any) -> list[Any]:
    assert add.shape == x.shape
    return _norm_gradients(dz, x, gamma)


@_function
def layernorm_bwd(dz: Any, x: Any, gamma: Any) -> list[Any]:
    return _norm_gradients(dz, x, gamma, gamma)


@_function
def quantize(tensor: torch.Tensor, quantizer: Any, output: Any = None) -> Any:
    if output is None:
        return _made(tensor.shape, tensor.dtype, quantizer)
    assert math.prod(gemm.size(output)) == tensor.numel()
    return output


@_function
def dequantize(input: Any, otype: Any) -> torch.Tensor:
    return _new(gemm.size(input), gemm.torch_dtype(otype))


@_function
def bgrad_quantize(input: torch.Tensor, quantizer: Any) -> list[Any]:
    return [_new(input.shape[-1:], input.dtype), _made(input.shape, input.dtype, quantizer)]


@_function
def split_quantize(
    tensor: torch.Tensor, split_sections: list[int], quantizer_list: list[Any]
) -> list[Any]:
    assert sum(split_sections) == tensor.shape[0], f"{split_sections} of {tuple(tensor.shape)}"
    pairs = zip(split_sections, quantizer_list, strict=True)
    return [_made([rows, *tensor.shape[1:]], tensor.dtype, each) for rows, each in pairs]


@_function
def multi_tensor_quantize(tensor_list: list[torch.Tensor], quantizer_list: list[Any]) -> list[Any]:
    pairs = zip(tensor_list, quantizer_list, strict=True)
    return [_made(tensor.shape, tensor.dtype, each) for tensor, each in pairs]


# An allocation by itself.
HOST.update(("create_empty_quantized_tensor", "bulk_allocate"))


@_function
def create_empty_quantized_tensor(quantizer: Any, shape: Sequence[int], dtype: Any) -> Any:
    if type(quantizer).__name__ == "Float8Quantizer":
        return _empty_float8(quantizer, list(shape), dtype)
    whole = tuple(shape)
    inner = quantizer.alloc_tensors(whole, device="cuda")
    description = quantizer.create_metadata(whole, dtype=dtype)
    return description["cls"].__tensor_unflatten__(inner, description, torch.Size(whole), None)


def _empty_float8(quantizer: Any, shape: list[int], dtype: torch.dtype) -> Any:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    turned = [shape[-1], *shape[:-1]]
    fields = {
        "data": _new(shape, torch.uint8) if quantizer.rowwise_usage else None,
        "data_transpose": _new(turned, torch.uint8) if quantizer.columnwise_usage else None,
        "fp8_scale_inv": _new([1], torch.float32),
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(fake_dtype=dtype, **fields)
    return Float8Tensor(shape=shape, dtype=dtype, device=torch.device("cuda"), **fields)


@_function
def bulk_allocate(shapes: list[Any], dtypes: list[torch.dtype]) -> list[torch.Tensor]:
    return [_new(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


@_function
def fp8_transpose(input: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    shape = [input.shape[-1], input.shape[:-1].numel()]
    assert input.dtype == torch.uint8
    if out is None:
        return _new(shape, torch.uint8)
    assert out.numel() == input.numel()
    return out


@_function
def swap_first_dims(tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    first, second, *rest = tensor.shape
    return _new([second, first, *rest], tensor.dtype) if out is None else out


def _pad(input: torch.Tensor, output: torch.Tensor, few: list[int], many: list[int]) -> None:
    assert sum(few) == input.shape[0], f"{few} rows of {tuple(input.shape)}"
    assert sum(many) == output.shape[0], f"{many} rows of {tuple(output.shape)}"
    assert input.shape[1:] == output.shape[1:]
    assert input.is_contiguous()
    assert output.is_contiguous()


@_function
def fused_multi_row_padding(
    input: Any, output: Any, input_row_list: list[int], padded_input_row_list: list[int]
) -> None:
    _pad(input, output, input_row_list, padded_input_row_list)


@_function
def fused_multi_row_unpadding(
    input: Any, output: Any, input_row_list: list[int], unpadded_input_row_list: list[int]
) -> None:
    _pad(input, output, input_row_list, unpadded_input_row_list)


@_function
def get_fused_attn_backend(fused_attn_params: Any = None) -> Any:
    import transformer_engine_torch as extension

    backend = extension.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen
    # Older versions have each setting as an argument, and no reason in the answer.
    return backend if fused_attn_params is None else (backend, "")


HOST.add("get_fused_attn_backend")


@_function
def fused_attn_fwd(
    max_seqlen_q: int, cu_seqlens_q: torch.Tensor, cu_seqlens_kv: torch.Tensor,
    Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor, fake_dtype: torch.dtype,
) -> list[Any]:  # fmt: skip
    _check_attention(cu_seqlens_q, cu_seqlens_kv, Q, K, V)
    output = _new([*Q.shape[:-1], V.shape[-1]], fake_dtype)
    sequences = cu_seqlens_q.shape[0] - 1
    statistics = _new([sequences, Q.shape[-2], max_seqlen_q, 1], torch.float32)
    return [output, statistics, _new([2], torch.int64)]


def _check_attention(
    cu_seqlens_q: torch.Tensor, cu_seqlens_kv: torch.Tensor, *layers: torch.Tensor
) -> None:
    for lengths in (cu_seqlens_q, cu_seqlens_kv):
        assert lengths.dtype == torch.int32, f"sequence lengths in {lengths.dtype}"
    query, key, value = layers
    assert query.dtype in (torch.float16, torch.bfloat16), f"attention in {query.dtype}"
    assert query.shape[-1] == key.shape[-1], "channels of queries and keys differ"
    assert key.shape[:-1] == value.shape[:-1], "keys and values differ"
    assert query.shape[-2] % key.shape[-2] == 0, "queries are no multiple of the groups"
    assert query.shape[-1] % 8 == 0, "cuDNN needs a multiple of 8 channels"


@_function
def fused_attn_bwd(
    cu_seqlens_q: Any, cu_seqlens_kv: Any, Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor,
    O: torch.Tensor, dO: torch.Tensor, fake_dtype: torch.dtype,  # noqa: E741
    dqkv_layout: Any = None, qkv_layout: Any = None,
) -> list[Any]:  # fmt: skip
    _check_attention(cu_seqlens_q, cu_seqlens_kv, Q, K, V)
    assert O.numel() == dO.numel()
    # Older versions give gradients the layout of their tensors.
    layout = qkv_layout if dqkv_layout is None else dqkv_layout
    name, rest = layout.name, [None, None]
    if "3HD" in name or "H3D" in name:
        axis = -3 if "3HD" in name else -2
        shape = list(Q.shape)
        shape.insert(len(shape) + 1 + axis, 3)
        whole = _new(shape, fake_dtype)
        return [whole.select(axis, number) for number in range(3)] + rest
    return [_new(each.shape, fake_dtype) for each in (Q, K, V)] + rest


@_function
def fused_rope_forward(input: torch.Tensor) -> torch.Tensor:
    return _new(input.shape, input.dtype)


@_function
def fused_rope_backward(output_grads: torch.Tensor) -> torch.Tensor:
    return _new(output_grads.shape, output_grads.dtype)


@_function
def swiglu(input: torch.Tensor, quantizer: Any) -> Any:
    return _made([*input.shape[:-1], input.shape[-1] // 2], input.dtype, quantizer)


@_function
def dswiglu(grad: torch.Tensor, fwd_input: torch.Tensor, quantizer: Any) -> Any:
    assert 2 * grad.shape[-1] == fwd_input.shape[-1]
    return _made(fwd_input.shape, fwd_input.dtype, quantizer)


def _same_lengths(tensor_lists: list[list[torch.Tensor]]) -> None:
    first, *others = tensor_lists
    for other in others:
        assert [each.numel() for each in other] == [each.numel() for each in first]
    for each in (each for tensors in tensor_lists for each in tensors):
        assert each.is_cuda, f"a tensor on {each.device}"
        assert each.is_contiguous(), "lists of tensors must be contiguous"


@_function
def multi_tensor_l2norm(
    tensor_lists: list[list[torch.Tensor]], per_tensor: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    _same_lengths(tensor_lists)
    count = len(tensor_lists[0]) if per_tensor else 0
    return _new([1], torch.float32), _new([count], torch.float32)


for _name in (
    "multi_tensor_scale", "multi_tensor_scale_tensor", "multi_tensor_adam",
    "multi_tensor_adam_param_remainder", "multi_tensor_adam_fp8",
    "multi_tensor_compute_scale_and_scale_inv",
):  # fmt: skip
    FUNCTIONS[_name] = lambda tensor_lists: _same_lengths(tensor_lists)
for _name in (
    "compute_amax", "fused_amax_and_scale_update_after_reduction",
    "fp8_block_scaling_compute_partial_amax", "fp8_block_scaling_partial_cast",
):  # fmt: skip
    FUNCTIONS[_name] = lambda: None
