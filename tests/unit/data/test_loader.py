import pytest
import torch

from moepp_megatron.config import UnfitError
from moepp_megatron.data import loader
from moepp_megatron.data.loader import batches

GLOBAL_BATCH_SIZE = 8


class Numbers(torch.utils.data.Dataset):
    """Sample i is [i]."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        assert 0 <= index < self.size
        return {"tokens": torch.tensor([index])}


def read(dp_size, micro_batch_size, size=45, consumed=0, workers=0):
    """Samples of all ranks, as [step][sample] in the order the definition gives them."""
    by_rank = [
        [
            batch["tokens"].flatten().tolist()
            for batch in batches(
                Numbers(size), consumed, micro_batch_size, rank, dp_size, GLOBAL_BATCH_SIZE, workers
            )
        ]
        for rank in range(dp_size)
    ]
    num_micro_batches = GLOBAL_BATCH_SIZE // (micro_batch_size * dp_size)
    assert all(len(micro_batches) % num_micro_batches == 0 for micro_batches in by_rank)
    flat = [sample for ranks in zip(*by_rank, strict=True) for batch in ranks for sample in batch]
    return [flat[i : i + GLOBAL_BATCH_SIZE] for i in range(0, len(flat), GLOBAL_BATCH_SIZE)]


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_layout(dp_size, micro_batch_size):
    # 45 samples: five batches of 8, and 5 left over.
    expected = [list(range(start, start + 8)) for start in range(0, 40, 8)]
    assert read(dp_size, micro_batch_size) == expected


def test_rank_gets_its_micro_batches():
    got = [batch["tokens"].flatten().tolist() for batch in batches(Numbers(16), 0, 2, 1, 2, 8)]
    assert got == [[2, 3], [6, 7], [10, 11], [14, 15]]


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_resume_continues_exactly(dp_size):
    assert read(dp_size, 2, consumed=16) == read(dp_size, 2)[2:]
    # A run whose batch size changed may stop anywhere.
    assert read(dp_size, 2, consumed=3)[0] == list(range(3, 11))


def test_workers_keep_the_order():
    assert read(1, 2, workers=2) == read(1, 2)


@pytest.mark.parametrize("consumed", [40, 45, 46, 1000])
def test_exhausted_dataset_yields_nothing(consumed):
    assert read(2, 2, consumed=consumed) == []


@pytest.mark.parametrize(
    "numbers", [(0, 0, 0, 1, 8), (-1, 2, 0, 1, 8), (0, 2, 2, 2, 8), (0, 2, 0, 3, 8)]
)
def test_numbers_that_do_not_fit_are_refused(numbers):
    with pytest.raises(AssertionError, match="do not fill 8"):
        batches(Numbers(16), *numbers)


@pytest.mark.parametrize(
    "said",
    [
        None,
        "DataLoader worker is killed by signal: Bus error. It is possible that dataloader's "
        "workers are out of shared memory.",
        "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)",
    ],
)
def test_no_room_in_shared_memory_is_one_line(said, monkeypatch):
    def without_room(_):
        raise RuntimeError(said)

    if said is None:
        monkeypatch.setattr(loader, "free_bytes", lambda _: 4096)
    else:
        monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", without_room)
    rule = r"^data.num_workers \(1\) needs more shared memory than /dev/shm has room for; make .*$"
    with pytest.raises(UnfitError, match=rule):
        next(batches(Numbers(8), 0, 2, 0, 1, 8, num_workers=1))
