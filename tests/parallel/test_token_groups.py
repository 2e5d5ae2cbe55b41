"""Numbers by data source and class of tokens: right in one process, the same in every layout."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from moepp_megatron.data.token_classes import BANDS
from tests.parallel.test_health import LAYOUTS
from tests.parallel.training_runs import (
    VANILLA,
    SyntheticDataset,
    begin_training,
    counting_parts,
    short,
)

NAMES = ("web", "code", "absent")
NUM_FFN = 8


class SourcedTokens(SyntheticDataset):
    """Sequences whose first tokens are of one data source, the others of another."""

    source_names = NAMES

    def __getitem__(self, index):
        import torch

        sample = super().__getitem__(index)
        positions = torch.arange(self._config.model.seq_length)
        return sample | {"sources": (positions >= 2 + index % 7).to(torch.int32)}


def measure(raw, recounts=False):
    """Fields of a step's record, and the same counted by hooks if asked for (in one process)."""
    from moepp_megatron.features.tokens.part import TokenClassesPart
    from moepp_megatron.moe.layer import moepp_layers
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.part import Part
    from moepp_megatron.training.step import training_step

    config, layout, model = begin_training(raw)
    dataset = SourcedTokens(config, 2)
    losses = []

    class Losses(Part):
        def see(self, chunk, batch, token_losses):
            losses.append((batch, token_losses.detach()))

    parts = counting_parts(config, layout, model, dataset, Losses())
    batches = rank_batches(dataset, 0, config, len(model.chunks))
    maps = []
    if recounts:
        for layer in moepp_layers(model.models[0]):
            layer.router.register_forward_hook(lambda *call: maps.append(call[2].routing_map))
    fields = {}
    for step in (1, 2):
        maps.clear()
        losses.clear()
        parts.begin_step(step, layout)
        training_step(model, batches, config, layout, parts)
        fields = parts.record(SimpleNamespace(number=step), {})
    kept = {key: fields[key] for key in fields if key.startswith(("source_", "class_"))}
    if not recounts:
        return kept, {}
    (groups,) = [part.groups for part in parts if isinstance(part, TokenClassesPart)]
    return kept, recounted(maps, losses, groups)


def recounted(maps, losses, groups):
    """The fields from routing maps [T, E] of micro-batches and layers, and batches with losses."""
    import torch

    def flat(values):
        return torch.cat([each.T.reshape(-1) for each in values]).double().numpy()

    ids, of, mask = (
        flat([batch[key] for batch, _ in losses]) for key in ("tokens", "sources", "loss_mask")
    )
    nats = flat([found for _, found in losses]) * mask
    layers = len(maps) // len(losses)
    routing = np.stack([torch.cat(maps[row::layers]).numpy() for row in range(layers)])
    ffn = routing[:, :, :NUM_FFN].sum(axis=2).mean(axis=0)
    sources = {name: of == index for index, name in enumerate(NAMES[:2])}
    shares = {name: routing[:, mine].mean(axis=(0, 1)) for name, mine in sources.items()}
    classes = {
        name: groups.ids(np.arange(len(groups.names)) == index)[ids.astype(int)]
        for index, name in enumerate(groups.names)
    }
    return {
        "source_tokens": {name: mask[mine].sum() / mask.sum() for name, mine in sources.items()},
        "source_loss": {
            name: nats[mine].sum() / mask[mine].sum() for name, mine in sources.items()
        },
        "source_expert_share": {name: share / share.sum() for name, share in shares.items()},
        "class_ffn_per_token": {name: ffn[mine].mean() for name, mine in classes.items()},
    }


MOE = {"num_ffn_experts": NUM_FFN}


@pytest.fixture(scope="module")
def whole(ranks):
    return ranks(1).run(measure, short(moe=MOE), True)[0]


def flat(values):
    """Numbers by their way through a record."""
    found = {}
    for key, value in values.items():
        inner = value if isinstance(value, dict) else dict(enumerate(value))
        for name, number in inner.items():
            parts = {"": number} if np.ndim(number) == 0 else dict(enumerate(number))
            found |= {f"{key}/{name}/{part}": float(each) for part, each in parts.items()}
    return found


def test_counted_by_hand(whole):
    fields, recount = whole
    for key, expected in recount.items():
        # Sums in another order.
        assert flat({key: fields[key]}) == pytest.approx(flat({key: expected}), rel=1e-6), key
    # Not that of one source for both.
    assert abs(fields["source_loss"]["web"] - fields["source_loss"]["code"]) > 1e-3
    for name, share in fields["source_ffn_share"].items():
        assert share == pytest.approx(sum(fields["source_expert_share"][name][:NUM_FFN]))
    assert "absent" not in fields["source_loss"]
    assert set(fields["class_ffn_per_token"]) == set(BANDS)
    json.dumps(fields)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_layouts_agree(ranks, whole, layout):
    world_size, parallel, training = LAYOUTS[layout]
    raw = short(moe=MOE, parallel=parallel, training=training)
    results = ranks(world_size).run(measure, raw)
    for fields, _ in results:
        # Losses of a second step differ in the last bits of fp32; counts not at all.
        assert flat(fields) == pytest.approx(flat(whole[0]), rel=1e-5)
        assert fields["source_loss"] == results[0][0]["source_loss"], "to the same bits"
        for key in ("source_tokens", "source_expert_share", "class_ffn_per_token"):
            assert flat({key: fields[key]}) == pytest.approx(flat({key: whole[0][key]}), rel=1e-12)


@pytest.mark.parametrize(
    ("section", "left"),
    [
        # Vanilla layers do not know their tokens; their losses are known.
        ({"moe": VANILLA}, {"source_tokens", "source_loss"}),
        ({"observe": {"token_groups": False}}, set()),
    ],
)
def test_what_is_not_counted(ranks, section, left):
    fields, _ = ranks(1).run(measure, short(**{"moe": MOE, **section}))[0]
    assert set(fields) == left
