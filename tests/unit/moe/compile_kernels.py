"""Compile every kernel for sm_90 and print its name, registers and bytes on the stack.

Run as a module, without a GPU. Registers that do not fit are on the stack.
"""

import re
import subprocess
import tempfile

from triton import knobs, next_power_of_2
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from moepp_megatron.moe.kernels import combine, combine_triton, cross_entropy, router, rows, tags

HOPPER = GPUTarget("cuda", 90, 32)
# Bytes of shared memory that a program may have on an H100 (CUDA C++ Programming Guide, compute
# capability 9.0): 227 KiB. A launch of one that wants more fails.
SHARED = 227 * 1024
MODULES = {
    "router": router,
    "combine": combine_triton,
    "rows": rows,
    "cross_entropy": cross_entropy,
    "tags": tags,
}
INTEGERS = {"positions", "sequences", "num_tokens", "stride", "programs", "columns"}
POINTERS = {"map_ptr": "*i1", "padded_ptr": "*i1", "table_ptr": "*i32", "counts_ptr": "*i32"}
POINTERS |= {f"{name}_ptr": "*i64" for name in ("labels", "tags", "groups", "sources")}
BF16 = {"rows_ptr", "x_ptr", "v_ptr", "addend_ptr", "output_ptr", "grad_ptr"}
BF16 |= {"grad_rows_ptr", "grad_x_ptr"}


def compile_kernel(name, constants, fp32=False, logits="*fp32", **options):
    """Compile for arguments of the types that training has, in bf16; options as in a launch."""
    module, function = name.split(".")
    kernel = getattr(MODULES[module], function)
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {argument: kind(argument, constants, fp32) for argument in kernel.arg_names}
    if "logits_ptr" in signature:
        signature["logits_ptr"] = logits
    # Tensors begin at multiples of 16 bytes; a launch tells the compiler, which then loads as much.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*") or signature[argument] == "i32"
    }
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = compile(source, target=HOPPER, options=options)
    shared = compiled.metadata.shared
    assert shared <= SHARED, f"{name} wants {shared} bytes of shared memory: {constants}"
    code = compiled.asm
    # Profilers show this name and no module's.
    assert f".entry {function}(" in code["ptx"]
    assert function.removeprefix("_").startswith("moepp_")
    assert "tf32" not in code["ptx"], f"{name} multiplies with 11 bits of a factor's 24"
    if not fp32:
        print(name, *resources(code["cubin"]))


def resources(cubin):
    """Registers of a thread and bytes of its stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def kind(argument, constants, fp32):
    """Triton's name of an argument's type."""
    if argument in constants:
        return "constexpr"
    if argument in INTEGERS:
        return "i32"
    if not argument.endswith("_ptr"):
        return "fp32"
    return POINTERS.get(argument, "*bf16" if argument in BF16 and not fp32 else "*fp32")


def compile_combine(constants, copies, extra):
    """The three kernels of the combine as `kernels.combine` launches them."""
    block = max(combine._LEAST, next_power_of_2(constants + copies))
    sizes = {"CONSTANTS": constants, "COPIES": copies, "BLOCK_C": block, "PARTS": 3}
    sizes |= {"NUM_EXPERTS": 9 + copies + constants, "FIRST": 8, "SLOTS": 2, "CHUNK": 64}
    sizes |= extra
    tile = combine._tile(768, block) | {"WIDEN": False}
    warps = tile.pop("num_warps")
    # In fp32 the most shared memory is wanted, and from some columns on not all registers fit.
    is_wide = constants > 100
    for name in ("forward", "backward"):
        stages = combine._stages(block, is_backward=name == "backward")
        options = {"num_warps": warps, "num_stages": stages}
        if is_wide or (constants == 2 and name == "forward"):
            compile_kernel(f"combine.moepp_combine_{name}", sizes | tile, fp32=True, **options)
        if not is_wide:
            compile_kernel(f"combine.moepp_combine_{name}", sizes | tile, **options)
    tile["BLOCK_T"] = combine._TILE_OF_WEIGHTS // block
    compile_kernel("combine.moepp_combine_backward_of_weights", sizes | tile)


def main():
    """All kernels, each with everything and with as little as possible."""
    experts = {"NUM_EXPERTS": 12, "BLOCK_T": 32, "BLOCK_E": 16, "TOPK": 2, "END": 11}
    experts |= {"TILES": 2, "NUM_FFN": 8, "GROUPS": 1, "KEPT": 1, "RANKED": 1}
    without = {"bias_ptr": None, "padded_ptr": None, "partial_ptr": None, "grad_sums_ptr": None}
    for extra, rest in (
        ({"SCORE": "softmax", "NORMALIZED": True}, {}),
        ({"SCORE": "sigmoid", "NORMALIZED": False}, without),
        ({"SCORE": "sqrtsoftplus", "NORMALIZED": False}, {}),
    ):
        for name in ("router._moepp_select_forward", "router._moepp_select_backward"):
            compile_kernel(name, experts | extra | rest)
    # The most experts and selections of a published model.
    most = {"NUM_EXPERTS": 512, "BLOCK_T": 1, "BLOCK_E": 512, "TOPK": 22, "END": 511}
    most |= {"NUM_FFN": 512, "SCORE": "sigmoid", "NORMALIZED": True}
    compile_kernel("router._moepp_select_forward", experts | most)
    # DeepSeek-V3's groups.
    many = {"NUM_EXPERTS": 320, "BLOCK_T": 1, "BLOCK_E": 512, "TOPK": 8, "END": 319, "TILES": 2}
    many |= {"NUM_FFN": 256, "GROUPS": 8, "KEPT": 4, "RANKED": 2}
    compile_kernel("router._moepp_select_forward", many | {"SCORE": "sigmoid", "NORMALIZED": True})
    absent = ("mixing_ptr", "v_ptr", "addend_ptr", "grad_mixing_ptr", "vectors_ptr")
    # Triton compiles anew for an argument that is 1.
    one_token = dict.fromkeys(absent) | {"num_tokens": 1}
    cases = (2, 1, {}), (0, 2, one_token), (30, 2, {"SLOTS": 12}), (62, 2, {"SLOTS": 8})
    cases += ((254, 1, {}),)
    for constants, copies, extra in cases:
        compile_combine(constants, copies, extra)
    for columns, block_t, slots in ((8, 128, 2), (64, 32, 6), (256, 8, 8)):
        sizes = {"COLUMNS": columns, "BLOCK_M": columns, "SLOTS": slots, "BLOCK_S": 8, "TILES": 4}
        for name in ("_moepp_count_rows", "_moepp_number_rows"):
            compile_kernel(f"rows.{name}", sizes | {"BLOCK_T": block_t, "BLOCK_P": 32})
    by_tags = {"GROUPS": 40, "SOURCE_BIT": tags.SOURCE, "BLOCK_TAGS": tags._BLOCK_TAGS}
    by_tags |= {"BLOCK_T": tags._BLOCK_T, "padded_ptr": None}
    few = {"SOURCES": 0, "NUM_EXPERTS": 12, "NUM_FFN": 8, "BLOCK_E": 16}
    compile_kernel("tags._moepp_count_tags", by_tags | few, num_warps=tags._WARPS)
    del by_tags["padded_ptr"]
    many = {"SOURCES": 7, "NUM_EXPERTS": 320, "NUM_FFN": 256, "BLOCK_E": tags._MOST_COLUMNS}
    compile_kernel("tags._moepp_count_tags", by_tags | many, num_warps=tags._WARPS)
    for logits in ("*bf16", "*fp32"):
        for name in ("_moepp_reduce_logits", "_moepp_write_loss_gradient"):
            compile_kernel(f"cross_entropy.{name}", {"BLOCK": cross_entropy._BLOCK}, logits=logits)


if __name__ == "__main__":
    main()
