"""A save and a load move each rank's own bytes, and each byte once."""

from collections import Counter

import pytest

from tests.parallel.saving_runs import Run


def save_and_load(folder):
    """Counts of this rank of a data- and expert-parallel pair."""
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from moepp_megatron.runtime.patches import replaced
    from moepp_megatron.training.checkpoint import data_only
    from moepp_megatron.training.checkpoint.plain_pickle import read_metadata
    from moepp_megatron.training.checkpoint.read import read_checkpoint
    from moepp_megatron.training.checkpoint.state import saved_state, state_to_load

    read = []

    def refuse(*_, **__):
        raise AssertionError("a save gathers tensors")

    def read_data(reader, plan, planner):
        indexes = [item.storage_index for item in plan.items]
        read.extend((index.fqn, tuple(index.offset or ())) for index in indexes)
        return read_as_usual(reader, plan, planner)

    run = Run(folder)
    run.step()
    with replaced(dist, all_gather=refuse, all_gather_into_tensor=refuse):
        state = saved_state(run.model)
    held = [entry.data for entry in state["optimizer"]]
    assert all(isinstance(entry, ShardedTensor) for entry in state["optimizer"])
    own = {
        value.untyped_storage().data_ptr()
        for optimizer in run.model.optimizer.chained_optimizers
        for values in optimizer.optimizer.state.values()
        for value in values.values()
    }
    run.save()
    wanted = state_to_load(run.model)["optimizer"]
    checkpoint = folder / "step_00000001"
    read_as_usual = data_only._CheckpointReader.read_data
    with replaced(data_only._CheckpointReader, read_data=read_data):
        read_checkpoint(checkpoint, run.model, run.config)
    index = read_metadata(checkpoint)
    tensors = [
        (key, tuple(chunk.offsets))
        for key, entry in index.state_dict_metadata.items()
        for chunk in getattr(entry, "chunks", ())
    ]
    return {
        "copied": [tuple(t.shape) for t in held if t.untyped_storage().data_ptr() not in own],
        "moments": sum(tensor.nbytes for tensor in held),
        "copied when loading": sum(
            entry.data.untyped_storage().data_ptr() not in own for entry in wanted
        ),
        "read": [name for name in read if name in set(tensors)],
        "stored": tensors,
        "elements": sum(
            entry.size.numel()
            for key, entry in index.state_dict_metadata.items()
            if key.startswith("optimizer.state.")
        ),
    }


@pytest.fixture(scope="module")
def counts(ranks, tmp_path_factory):
    return ranks(2).run(save_and_load, tmp_path_factory.mktemp("bytes") / "checkpoints")


def test_a_save_gathers_and_copies_nothing(counts):
    assert [rank["copied"] for rank in counts] == [[], []]
    # Numbers of 4 bytes: no element is on two ranks, and none is missing.
    assert sum(rank["moments"] for rank in counts) == 4 * counts[0]["elements"]


def test_a_load_reads_every_byte_once_and_copies_nothing(counts):
    assert [rank["copied when loading"] for rank in counts] == [0, 0]
    read = Counter(name for rank in counts for name in rank["read"])
    assert read == Counter(counts[0]["stored"])
    assert set(read.values()) == {1}
