"""Matrix products of Transformer Engine on Hopper: sizes, dtypes and what cuBLAS asks of FP8."""

import math

import torch

_TORCH = {
    0: torch.uint8,
    2: torch.int32,
    3: torch.int64,
    4: torch.float32,
    5: torch.float16,
    6: torch.bfloat16,
    7: torch.uint8,
    8: torch.uint8,
}
# cublaslt_gemm.cu: leading dimensions of FP8 products.
_MULTIPLE = 16


def torch_dtype(dtype):
    """Of the extension's enum."""
    return _TORCH[int(dtype)]


def size(tensor):
    """The shape of a tensor or of one of Transformer Engine's storages."""
    return tuple(tensor.shape if isinstance(tensor, torch.Tensor) else tensor.size())


def is_quantized(tensor):
    """True if it holds FP8."""
    return hasattr(tensor, "_quantizer")


def output_dtype(a, wanted):
    """Of a product whose output is not given."""
    if wanted is not None:
        return torch_dtype(wanted)
    assert not is_quantized(a), "an FP8 product needs a dtype of its output"
    return a.dtype  # type: ignore[no-any-return]


def output_shape(a, trans_a, b, trans_b):
    """The shape of a product, whose operands are checked (gemm.cpp, `getGemmOutputShape`)."""
    (a_rows, a_columns), (b_rows, b_columns) = _flat(a), _flat(b)
    depth = a_columns if trans_a else a_rows
    text = f"{size(a)} {trans_a}, {size(b)} {trans_b}"
    assert depth == (b_rows if trans_b else b_columns), f"dimensions do not fit: {text}"
    _check_operands(a, trans_a, b, trans_b, depth, text)
    shape = [b_columns] if trans_b else list(size(b)[:-1])
    return [*shape, a_rows if trans_a else a_columns]


def check_output(output, shape, dtype):
    """The output that a product is written to."""
    assert list(size(output)) == shape, f"output has {size(output)}, the product {shape}"
    if isinstance(output, torch.Tensor) and not is_quantized(output):
        assert output.is_contiguous(), "output of a product is not contiguous"
        assert dtype is None or output.dtype == torch_dtype(dtype), f"{output.dtype}, not {dtype}"


def _flat(tensor):
    shape = size(tensor)
    return math.prod(shape[:-1]), shape[-1]


def _check_operands(a, trans_a, b, trans_b, depth, text):
    assert is_quantized(a) == is_quantized(b), f"one operand is FP8: {text}"
    if not is_quantized(a):
        assert a.dtype == b.dtype, f"operands in {a.dtype} and {b.dtype}: {text}"
        for each in (a, b):
            assert each.is_cuda, f"an operand on {each.device}: {text}"
            # Their strides are not looked at.
            assert each.is_contiguous(), f"an operand is not contiguous: {text}"
        return
    if 0 in (*size(a), *size(b)):
        return
    # Hopper multiplies FP8 along rows only, so the other side needs a transpose.
    _check_usage(a, trans_a, text)
    _check_usage(b, not trans_b, text)
    assert depth % _MULTIPLE == 0, f"depth of an FP8 product is no multiple of 16: {text}"
    both_2d = [getattr(each, "_is_2D_scaled", False) for each in (a, b)]
    assert not all(both_2d), f"FP8 blocks of two dimensions on both sides: {text}"


def _check_usage(tensor, along_rows, text):
    if along_rows:
        names = ("_rowwise_data", "_data")
    else:
        names = ("_columnwise_data", "_transpose")
        assert not getattr(tensor, "_transpose_invalid", False), f"a stale transpose: {text}"
    data = [getattr(tensor, name, None) for name in names]
    way = "rows" if along_rows else "columns"
    assert any(each is not None for each in data), f"no FP8 data along {way}: {text}"
