"""Rotary position embedding, [s, b, heads, channels]."""

import torch


def apply_rotary_pos_emb(
    t,
    freqs,
    tensor_format="sbhd",
    start_positions=None,
    interleaved=False,
    fused=False,
    cu_seqlens=None,
    cp_size=1,
    cp_rank=0,
):
    assert tensor_format == "sbhd"
    assert not interleaved
    turned, kept = t[..., : freqs.shape[-1]], t[..., freqs.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    angles = freqs[: t.shape[0]]
    rotated = torch.cat([-second, first], dim=-1)
    turned = turned * angles.cos().to(t.dtype) + rotated * angles.sin().to(t.dtype)
    return torch.cat([turned, kept], dim=-1)
