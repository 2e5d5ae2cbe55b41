"""Rows of each expert filled up with zero rows to a multiple, and taken away again."""

import torch
from transformer_engine.pytorch.quantization import (
    FP8GlobalStateManager,
    get_align_size_for_quantization,
)


class _Padding(torch.nn.Module):
    def __init__(self, num_gemms, align_size=None):
        super().__init__()
        self.num_gemms, self.align_size = num_gemms, align_size

    def padded(self, m_splits):
        assert len(m_splits) == self.num_gemms
        assert all(type(rows) is int for rows in m_splits), m_splits
        align = self.align_size or get_align_size_for_quantization(
            FP8GlobalStateManager.get_fp8_recipe()
        )
        return [-(-rows // align) * align for rows in m_splits]


class Fp8Padding(_Padding):
    def forward(self, inp, m_splits):
        padded = self.padded(m_splits)
        # Copied as one block.
        assert inp.is_contiguous()
        parts = [
            torch.nn.functional.pad(part, (0, 0, 0, rows - part.shape[0]))
            for part, rows in zip(inp.split(m_splits), padded, strict=True)
        ]
        return torch.cat(parts), padded


class Fp8Unpadding(_Padding):
    def forward(self, inp, m_splits):
        parts = inp.split(self.padded(m_splits))
        return torch.cat([part[:rows] for part, rows in zip(parts, m_splits, strict=True)])
