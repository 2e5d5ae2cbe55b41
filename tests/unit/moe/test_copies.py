"""Copying rows by a map and adding copies up again, against dense matrices."""

import pytest
import torch

from moepp_megatron.moe.copies import Copies

MAPS = {
    "random": torch.rand(13, 5, generator=torch.Generator().manual_seed(0)) < 0.4,
    "every column": torch.ones(4, 3, dtype=torch.bool),
    "nothing": torch.zeros(4, 3, dtype=torch.bool),
    "one row of many": torch.arange(6)[:, None] == torch.tensor([2, 2, 2]),
    "no rows": torch.zeros(0, 3, dtype=torch.bool),
}


def matrix(wanted):
    """[C, N] fp64, 1 where a copy is of a row: copies by column, then row."""
    rows = [
        row for column in wanted.T.tolist() for row, is_wanted in enumerate(column) if is_wanted
    ]
    copy_of = torch.zeros(len(rows), wanted.shape[0], dtype=torch.float64)
    copy_of[torch.arange(len(rows)), rows] = 1.0
    return copy_of


@pytest.mark.parametrize("name", MAPS)
def test_both_ways_are_products_with_one_matrix(name):
    wanted = MAPS[name]
    copies = Copies(wanted, int(wanted.sum()))
    copy_of = matrix(wanted)
    rows = torch.randn(wanted.shape[0], 7, dtype=torch.float64, requires_grad=True)
    values = torch.randn(copy_of.shape[0], 7, dtype=torch.float64, requires_grad=True)
    spread, sums = copies.spread(rows), copies.add_up(values)
    assert torch.equal(spread, copy_of @ rows)
    torch.testing.assert_close(sums, copy_of.T @ values, rtol=1e-15, atol=1e-15)

    grad_spread, grad_sums = torch.randn_like(spread), torch.randn_like(sums)
    (grad_rows,) = torch.autograd.grad(spread, rows, grad_spread)
    (grad_values,) = torch.autograd.grad(sums, values, grad_sums)
    torch.testing.assert_close(grad_rows, copy_of.T @ grad_spread, rtol=1e-15, atol=1e-15)
    assert torch.equal(grad_values, copy_of @ grad_sums)


@pytest.mark.parametrize("name", MAPS)
def test_row_and_column_of_every_copy(name):
    wanted = MAPS[name]
    copies = Copies(wanted, int(wanted.sum()))
    column, row = wanted.T.nonzero().unbind(dim=1)
    assert torch.equal(copies.row, row)
    assert torch.equal(copies.column, column)
    # Values in (row, column) order are those of a map read as it is written.
    values = torch.arange(wanted.numel()).view(wanted.shape)
    reordered = copies.in_order_of_columns(values[wanted].double())
    assert torch.equal(reordered, values.T[wanted.T].double())


def test_reordered_values_have_gradients():
    wanted = MAPS["random"]
    values = torch.randn(int(wanted.sum()), dtype=torch.float64, requires_grad=True)
    copies = Copies(wanted, len(values))
    assert torch.autograd.gradcheck(copies.in_order_of_columns, values)


def test_sums_of_bf16_are_rounded_once():
    wanted = torch.ones(1, 5, dtype=torch.bool)
    # 1 + 2^-8 is rounded to 1 in bf16: adding one after the other would stay there.
    values = torch.tensor([1.0, *[2**-8] * 4], dtype=torch.bfloat16).unsqueeze(1)
    sums = Copies(wanted, 5).add_up(values)
    assert sums.dtype is torch.bfloat16
    assert sums.item() == 1.0 + 4 * 2**-8
