"""Returns of the functions of Transformer Engine's extension: shapes and dtypes, no numbers.

Checks are those of its C++ code (gemm.cpp, normalization.cpp, cast.cpp, padding.cpp), and of the
matrix products of cuBLAS on Hopper. Arguments have the names of its source; what a function does
not name, it does not look at.
"""

import math

import torch

from tests.fake_gpu.engine import gemm

FUNCTIONS = {}
# Those that answer on the host, and start no kernel.
HOST = set()


def function(implementation):
    """Answers the extension's function of that name."""
    FUNCTIONS[implementation.__name__] = implementation
    return implementation


def _on_host(name, value):
    FUNCTIONS[name] = lambda: value
    HOST.add(name)


_on_host("get_cublasLt_version", 130500)
_on_host("get_cudnn_version", 92600)
_on_host("get_num_cublas_streams", 4)
_on_host("ubuf_built_with_mpi", False)
_on_host("device_supports_multicast", True)
_on_host("get_stream_priority_range", (0, -5))


def new(shape, dtype):
    """An empty tensor on the device."""
    return torch.empty(tuple(shape), dtype=dtype, device="cuda")


def _made(shape, dtype, quantizer):
    if quantizer is None:
        return new(shape, dtype)
    return quantizer.make_empty(list(shape), dtype=dtype, device=torch.device("cuda"))


@function
def generic_gemm(
    A,
    transA,
    B,
    transB,
    D,
    quantizer,
    output_dtype,
    bias,
    grad,
    accumulate,
    extra_output=None,
    beta=None,
):
    shape = gemm.output_shape(A, transA, B, transB)
    assert accumulate or not beta, "beta without accumulation"
    dtype = gemm.output_dtype(A, output_dtype)
    if D is None:
        D = _made(shape, dtype, quantizer)
    else:
        gemm.check_output(D, shape, output_dtype)
    of_bias = new(gemm.size(B)[-1:], dtype) if bias is not None and grad else None
    return [D, of_bias, None, extra_output]


@function
def te_general_grouped_gemm(
    A,
    transa,
    B,
    transb,
    D,
    D_type,
    m_splits,
    bias,
    single_output,
    workspace,
):
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


def _norm(input, weight, ln_out, quantizer, otype):
    assert weight.shape == input.shape[-1:], f"{tuple(weight.shape)} for {tuple(input.shape)}"
    if ln_out is None:
        ln_out = _made(input.shape, gemm.torch_dtype(otype), quantizer)
    rows = input.shape[:-1].numel()
    return [ln_out, new([rows], torch.float32), new([rows], torch.float32)]


@function
def layernorm_fwd(input, weight, ln_out, quantizer, otype):
    return _norm(input, weight, ln_out, quantizer, otype)


@function
def rmsnorm_fwd(input, weight, ln_out, quantizer, otype):
    output, _, rsigma = _norm(input, weight, ln_out, quantizer, otype)
    return [output, None, rsigma]


def _norm_gradients(dz, x, *parameters):
    assert dz.shape == x.shape, f"{tuple(dz.shape)} for {tuple(x.shape)}"
    return [new(x.shape, x.dtype), *(new(each.shape, each.dtype) for each in parameters)]


@function
def rmsnorm_bwd(dz, x, gamma):
    return _norm_gradients(dz, x, gamma)


@function
def rmsnorm_bwd_add(dz, x, add, gamma):
    assert add.shape == x.shape
    return _norm_gradients(dz, x, gamma)


@function
def layernorm_bwd(dz, x, gamma):
    return _norm_gradients(dz, x, gamma, gamma)


@function
def quantize(tensor, quantizer, output=None):
    if output is None:
        return _made(tensor.shape, tensor.dtype, quantizer)
    assert math.prod(gemm.size(output)) == tensor.numel()
    return output


@function
def dequantize(input, otype):
    return new(gemm.size(input), gemm.torch_dtype(otype))


@function
def bgrad_quantize(input, quantizer):
    return [new(input.shape[-1:], input.dtype), _made(input.shape, input.dtype, quantizer)]


@function
def split_quantize(tensor, split_sections, quantizer_list):
    assert sum(split_sections) == tensor.shape[0], f"{split_sections} of {tuple(tensor.shape)}"
    pairs = zip(split_sections, quantizer_list, strict=True)
    return [_made([rows, *tensor.shape[1:]], tensor.dtype, each) for rows, each in pairs]


@function
def multi_tensor_quantize(tensor_list, quantizer_list):
    pairs = zip(tensor_list, quantizer_list, strict=True)
    return [_made(tensor.shape, tensor.dtype, each) for tensor, each in pairs]


# An allocation by itself.
HOST.update(("create_empty_quantized_tensor", "bulk_allocate"))


@function
def create_empty_quantized_tensor(quantizer, shape, dtype):
    if type(quantizer).__name__ == "Float8Quantizer":
        return _empty_float8(quantizer, list(shape), dtype)
    whole = tuple(shape)
    if type(quantizer).__name__ == "MXFP8Quantizer":
        # quantizer.cpp, `MXFP8Quantizer::create_tensor`.
        sides = math.prod(whole[:-1]), whole[-1]
        assert all(side % 32 == 0 for side in sides), f"MXFP8 needs multiples of 32, not {whole}"
    inner = quantizer.alloc_tensors(whole, device="cuda")
    description = quantizer.create_metadata(whole, dtype=dtype)
    return description["cls"].__tensor_unflatten__(inner, description, torch.Size(whole), None)


def _empty_float8(quantizer, shape, dtype):
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    turned = [shape[-1], *shape[:-1]]
    fields = {
        "data": new(shape, torch.uint8) if quantizer.rowwise_usage else None,
        "data_transpose": new(turned, torch.uint8) if quantizer.columnwise_usage else None,
        "fp8_scale_inv": new([1], torch.float32),
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(fake_dtype=dtype, **fields)
    return Float8Tensor(shape=shape, dtype=dtype, device=torch.device("cuda"), **fields)


@function
def bulk_allocate(shapes, dtypes):
    return [new(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


@function
def fp8_transpose(input, out):
    shape = [input.shape[-1], input.shape[:-1].numel()]
    assert input.dtype == torch.uint8
    if out is None:
        return new(shape, torch.uint8)
    assert out.numel() == input.numel()
    return out


@function
def swap_first_dims(tensor, out):
    first, second, *rest = tensor.shape
    return new([second, first, *rest], tensor.dtype) if out is None else out


def _pad(input, output, few, many):
    assert sum(few) == input.shape[0], f"{few} rows of {tuple(input.shape)}"
    assert sum(many) == output.shape[0], f"{many} rows of {tuple(output.shape)}"
    assert input.shape[1:] == output.shape[1:]
    assert input.is_contiguous()
    assert output.is_contiguous()


@function
def fused_multi_row_padding(input, output, input_row_list, padded_input_row_list):
    _pad(input, output, input_row_list, padded_input_row_list)


@function
def fused_multi_row_unpadding(input, output, input_row_list, unpadded_input_row_list):
    _pad(input, output, input_row_list, unpadded_input_row_list)


@function
def swiglu(input, quantizer):
    return _made([*input.shape[:-1], input.shape[-1] // 2], input.dtype, quantizer)


@function
def dswiglu(grad, fwd_input, quantizer):
    assert 2 * grad.shape[-1] == fwd_input.shape[-1]
    return _made(fwd_input.shape, fwd_input.dtype, quantizer)


def _same_lengths(tensor_lists):
    first, *others = tensor_lists
    for other in others:
        assert [each.numel() for each in other] == [each.numel() for each in first]
    for each in (each for tensors in tensor_lists for each in tensors):
        assert each.is_cuda, f"a tensor on {each.device}"
        assert each.is_contiguous(), "lists of tensors must be contiguous"


@function
def multi_tensor_l2norm(tensor_lists, per_tensor=None):
    _same_lengths(tensor_lists)
    count = len(tensor_lists[0]) if per_tensor else 0
    return new([1], torch.float32), new([count], torch.float32)


for _name in (
    "multi_tensor_scale",
    "multi_tensor_scale_tensor",
    "multi_tensor_adam",
    "multi_tensor_adam_param_remainder",
    "multi_tensor_adam_fp8",
    "multi_tensor_compute_scale_and_scale_inv",
):
    FUNCTIONS[_name] = lambda tensor_lists: _same_lengths(tensor_lists)
for _name in (
    "compute_amax",
    "fused_amax_and_scale_update_after_reduction",
    "fp8_block_scaling_compute_partial_amax",
    "fp8_block_scaling_partial_cast",
):
    FUNCTIONS[_name] = lambda: None
