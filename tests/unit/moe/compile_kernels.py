"""Compile every kernel for sm_90 and print its name; run as a module, without a GPU."""

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from moepp_megatron.moe.kernels import combine_triton, cross_entropy, router, rows

HOPPER = GPUTarget("cuda", 90, 32)
MODULES = {
    "router": router, "combine": combine_triton, "rows": rows, "cross_entropy": cross_entropy
}  # fmt: skip
INTEGERS = {"positions", "sequences", "num_tokens", "stride", "programs", "columns"}
POINTERS = {"map_ptr": "*i1", "padded_ptr": "*i1", "table_ptr": "*i32", "counts_ptr": "*i32"}
POINTERS["labels_ptr"] = "*i64"
BF16 = {"rows_ptr", "x_ptr", "v_ptr", "addend_ptr", "output_ptr", "grad_ptr"}
BF16 |= {"grad_rows_ptr", "grad_x_ptr"}


def compile_kernel(name: str, constants: dict[str, Any], logits: str = "*fp32") -> None:
    """Compile for arguments of the types that training has."""
    module, function = name.split(".")
    kernel = getattr(MODULES[module], function)
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {argument: kind(argument, constants) for argument in kernel.arg_names}
    if "logits_ptr" in signature:
        signature["logits_ptr"] = logits
    # Tensors begin at multiples of 16 bytes; a launch tells the compiler, which then loads as much.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*") or signature[argument] == "i32"
    }
    assert compile(ASTSource(kernel, signature, constants, aligned), target=HOPPER).asm["cubin"]
    print(name)


def kind(argument: str, constants: dict[str, Any]) -> str:
    """Triton's name of an argument's type."""
    if argument in constants:
        return "constexpr"
    if argument in INTEGERS:
        return "i32"
    if not argument.endswith("_ptr"):
        return "fp32"
    return POINTERS.get(argument, "*bf16" if argument in BF16 else "*fp32")


def main() -> None:
    """All kernels, each with everything and with as little as possible."""
    experts = {"NUM_EXPERTS": 12, "BLOCK_T": 32, "BLOCK_E": 16, "TOPK": 2, "END": 11}
    without = {"bias_ptr": None, "padded_ptr": None, "partial_ptr": None, "grad_sums_ptr": None}
    for extra in ({"SOFTMAX": True, "NORMALIZED": True}, {"SOFTMAX": False, "NORMALIZED": False}):
        rest = {} if extra["SOFTMAX"] else without
        for name in ("router._forward", "router._backward"):
            compile_kernel(name, experts | extra | rest)
    tile = {"HIDDEN": 768, "SLOTS": 2, "BLOCK_T": 8, "BLOCK_D": 256, "CHUNK": 16, "PARTS": 3}
    tile |= {"NUM_EXPERTS": 12, "FIRST": 8, "BLOCK_E": 16}
    absent = ("mixing_ptr", "v_ptr", "addend_ptr", "grad_mixing_ptr", "vectors_ptr")
    # Triton compiles anew for an argument that is 1.
    one_token = dict.fromkeys(absent) | {"num_tokens": 1}
    for extra in (
        {"CONSTANTS": 2, "COPIES": 1, "BLOCK_C": 2},
        {"CONSTANTS": 0, "COPIES": 2, "BLOCK_C": 1} | one_token,
    ):
        for name in ("forward", "backward", "backward_of_weights"):
            compile_kernel(f"combine.{name}", tile | extra)
    for columns, block_t, slots in ((8, 128, 2), (64, 64, 6)):
        sizes = {"COLUMNS": columns, "BLOCK_M": columns, "SLOTS": slots, "BLOCK_S": 8}
        for name in ("_count", "_number"):
            compile_kernel(f"rows.{name}", sizes | {"BLOCK_T": block_t, "BLOCK_P": 32})
    for logits in ("*bf16", "*fp32"):
        for name in ("_reduce_logits", "_write_gradient"):
            compile_kernel(f"cross_entropy.{name}", {"BLOCK": cross_entropy._BLOCK}, logits)


if __name__ == "__main__":
    main()
