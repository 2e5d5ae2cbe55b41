"""The all-to-all in two halves: rows, gradients, and what it refuses."""

import numpy as np
import pytest

from tests.parallel.ranks import RankError

# Rows from rank (first index) to rank; rank 1 of two sends nothing to rank 0, rank 3 gets nothing.
ROWS = {2: [[1, 3], [0, 2]], 4: [[2, 0, 1, 0], [0, 0, 4, 0], [1, 1, 1, 0], [3, 2, 0, 0]]}


def exchange_both_ways(dtype):
    """Send rows that name their way, weigh what arrives, and take gradients."""
    import torch
    import torch.distributed as dist

    from moepp_megatron.moe.exchange import Exchange

    rank, table = dist.get_rank(), ROWS[dist.get_world_size()]
    send, receive = table[rank], [row[rank] for row in table]
    rows = [100 * rank + 10 * to + i for to, count in enumerate(send) for i in range(count)]
    values = torch.tensor(rows, dtype=getattr(torch, dtype)).unsqueeze(1).repeat(1, 2)
    values.requires_grad_(values.is_floating_point())
    exchange = Exchange(dist.group.WORLD, send, receive)
    ticket = exchange.begin(values)
    assert ticket.shape == (0,)
    arrived = exchange.end(ticket)
    if values.requires_grad:
        # Not contiguous, as gradients of expanded sums are; each row's gradient is its own value.
        arrived.backward(arrived.detach()[:, :1].expand_as(arrived))
        assert torch.equal(values.grad, values)
    return {"arrived": arrived.detach().float().numpy(), "dtype": str(arrived.dtype)}


# Names of rows on four ranks exceed what bf16 and a byte hold.
@pytest.mark.parametrize(
    ("world", "dtype"), [(2, "float32"), (2, "bfloat16"), (2, "uint8"), (4, "float32")]
)
def test_rows_and_gradients(ranks, world, dtype):
    table = ROWS[world]
    for rank, result in enumerate(ranks(world).run(exchange_both_ways, dtype)):
        expected = [
            100 * src + 10 * rank + i for src in range(world) for i in range(table[src][rank])
        ]
        assert result["dtype"] == f"torch.{dtype}"
        np.testing.assert_array_equal(
            result["arrived"], np.array(expected, dtype=float).reshape(-1, 1).repeat(2, axis=1)
        )


def end_before_begin():
    import torch
    import torch.distributed as dist

    from moepp_megatron.moe.exchange import Exchange

    Exchange(dist.group.WORLD, [1, 1], [1, 1]).end(torch.zeros(0))


def test_end_before_begin_is_an_error(ranks):
    with pytest.raises(RankError, match="an exchange ends that has not begun"):
        ranks(2).run(end_before_begin)


def begin_and_end_alone():
    import torch
    import torch.distributed as dist

    from moepp_megatron.moe.exchange import Exchange

    rows = torch.randn(3, 2)
    exchange = Exchange(dist.group.WORLD, [3], [3])
    return exchange.end(exchange.begin(rows)) is rows


def test_one_rank_exchanges_nothing(ranks):
    assert ranks(1).run(begin_and_end_alone) == [True]
