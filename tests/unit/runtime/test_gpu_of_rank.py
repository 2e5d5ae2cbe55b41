"""The GPU that a rank takes: one of its node's, or the first of its own."""

import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from moepp_megatron.config import UnfitError
from moepp_megatron.runtime import distributed as module
from moepp_megatron.runtime.distributed import _gpu_of_rank
from moepp_megatron.runtime.rank import RankEnvironment


def node(ranks, shown, monkeypatch):
    """Return the GPU of each rank of a node, or the error; `shown` are the UUIDs it sees."""
    seen = threading.local()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(seen.uuids))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=seen.uuids[i])
    )
    store, found = dist.HashStore(), [None] * ranks

    def be(rank):
        seen.uuids = shown[rank]
        environment = RankEnvironment(local_rank=rank, local_world_size=ranks, is_launched=True)
        try:
            found[rank] = _gpu_of_rank(environment, store)
        except UnfitError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=be, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_ranks_that_see_all_gpus_take_the_one_of_their_number(monkeypatch):
    gpus = [["a", "b", "c"]] * 2
    assert node(2, gpus, monkeypatch) == [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.mark.parametrize("shown", [[["a"], ["b"], ["c"]], [["a", "x"], ["b", "y"], ["c", "z"]]])
def test_ranks_that_see_their_own_alone_take_the_first(monkeypatch, shown):
    assert node(3, shown, monkeypatch) == [torch.device("cuda", 0)] * 3


@pytest.mark.parametrize(("gpus", "here"), [(["a"], 1), (["a", "b"], 2)])
def test_more_ranks_than_gpus_are_refused_on_all_of_them(monkeypatch, gpus, here):
    monkeypatch.setattr(module.socket, "gethostname", lambda: "node7")
    found = node(3, [gpus] * 3, monkeypatch)
    expected = f"ranks of node7 (3) must be at most its GPUs ({here}), since NCCL takes one rank"
    assert all(str(each).startswith(expected) for each in found), found
    assert len(set(found)) == 1


def test_a_group_that_exists_keeps_its_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    environment = RankEnvironment(local_rank=1, local_world_size=2, is_launched=True)
    assert _gpu_of_rank(environment, None) == torch.device("cuda", 0)
