"""Checksums see every bit, and the odd rank out is named."""

import pytest
import torch

from moepp_megatron.training.resilience import supervisor
from moepp_megatron.training.resilience.supervisor import _WORDS, _checksum, _who


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_any_single_bit_changes_the_checksum(dtype):
    tensor = torch.arange(5).to(dtype)
    expected = int(_checksum(tensor))
    size = tensor.element_size()
    words = tensor.view(_WORDS[size])
    for element in range(5):
        for bit in range(8 * size):
            mask = torch.tensor(1 << bit if bit < 8 * size - 1 else -(1 << bit), dtype=words.dtype)
            words[element] ^= mask
            assert int(_checksum(tensor)) != expected
            words[element] ^= mask
    assert int(_checksum(tensor)) == expected


def test_order_counts_and_strides_do_not():
    tensor = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert int(_checksum(tensor)) != int(_checksum(tensor.flip(0)))
    assert int(_checksum(tensor.T)) == int(_checksum(tensor.T.contiguous()))


def test_chunks_are_parts_of_one_sum(monkeypatch):
    tensor = torch.randn(1000)
    whole = int(_checksum(tensor))
    monkeypatch.setattr(supervisor, "_CHUNK", 64)
    assert int(_checksum(tensor)) == whole


def test_the_odd_rank_is_named():
    assert _who([0, 4, 8], [5, 7, 5]) == "rank 4 differs from the other 2 of 3 ranks"
    assert _who([0, 1, 2, 3, 4], [5, 6, 5, 7, 5]) == "rank 1, 3 differs from the other 3 of 5 ranks"
    assert _who([2, 3], [10, -1]) == (
        "no two halves agree: rank 2 000000000000000a, rank 3 ffffffffffffffff"
    )
