"""Operations of the distributed optimizer on FP8 weights."""

import torch
import torch.distributed as dist
from transformer_engine.pytorch.tensor import scale_of


def replace_raw_data(tensor, new_raw_data):
    new_raw_data.copy_(tensor._data)
    tensor._data = new_raw_data


def cast_master_weights_to_fp8(
    model_weights,
    master_weights,
    start_offsets,
    group,
    fsdp_shard_model_weights=None,
    manual_post_all_gather_processing=False,
):
    for weight, master, start in zip(model_weights, master_weights, start_offsets, strict=True):
        scale_inv = torch.zeros(1) if master is None else scale_of(master)
        dist.all_reduce(scale_inv, op=dist.ReduceOp.MAX, group=group)
        weight._scale_inv.copy_(scale_inv)
        if master is not None:
            shard = weight._data.view(-1)[start : start + master.numel()]
            shard.copy_((master / scale_inv).to(torch.float8_e4m3fn).view(torch.uint8))


def post_all_gather_processing(model_weights):
    assert isinstance(model_weights, list)
