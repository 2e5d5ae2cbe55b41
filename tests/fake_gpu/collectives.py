"""Collectives without peers: what they are given is checked, and nothing is sent."""

import contextlib

import torch
import torch.distributed as dist

from tests.fake_gpu.record import RECORD, place


class _Work:
    def wait(self, *args, **kwargs):
        return True

    def is_completed(self):
        return True


def install():
    names = (
        "all_gather",
        "all_gather_into_tensor",
        "_all_gather_base",
        "all_reduce",
        "all_to_all",
        "all_to_all_single",
        "barrier",
        "broadcast",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "_reduce_scatter_base",
        "isend",
        "irecv",
        "send",
        "recv",
    )
    for name in names:
        _replace(name, _collective(name))

    @contextlib.contextmanager
    def coalescing(*args, **kwargs):
        yield _Work()

    def gather_objects(into, value, group=None):
        into[:] = [value] * len(into)

    def gather_object(obj=None, object_gather_list=None, *_, **__):
        if object_gather_list is not None:
            gather_objects(object_gather_list, obj)

    def scatter_objects(into, values=None, **_):
        into[0] = (values or [None])[0]

    class P2POp:
        def __init__(self, op, tensor, peer=0, group=None):
            self.op, self.tensor = op, tensor

    def batch(operations):
        for each in operations:
            each.op(each.tensor)
        return [_Work() for _ in operations]

    _replace("_coalescing_manager", coalescing)
    _replace("all_gather_object", gather_objects)
    _replace("gather_object", gather_object)
    _replace("scatter_object_list", scatter_objects)
    _replace("broadcast_object_list", lambda *_, **__: None)
    _replace("P2POp", P2POp)
    _replace("batch_isend_irecv", batch)


def _replace(name, value):
    setattr(dist, name, value)
    setattr(dist.distributed_c10d, name, value)


def _collective(name):
    def collective(*args, async_op=False, **kwargs):
        RECORD.collectives[name] += 1
        for value in (*args, *kwargs.values()):
            for tensor in value if isinstance(value, list) else [value]:
                if not isinstance(tensor, torch.Tensor):
                    continue
                if tensor.device.type != "cuda":
                    RECORD.faults.append(f"{name}: a tensor on {tensor.device} at {place()}")
                if not tensor.is_contiguous():
                    RECORD.faults.append(f"{name}: not contiguous at {place()}")
        return _Work() if async_op or name in ("isend", "irecv") else None

    return collective
