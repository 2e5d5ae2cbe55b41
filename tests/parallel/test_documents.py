"""Documents that share sequences, with padding: every layout trains what one process trains."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.parallel.layouts import RECOMPUTE
from tests.parallel.ranks import RankPools
from tests.parallel.test_expert_overlap import both
from tests.parallel.test_latent_attention import WIDTHS
from tests.parallel.training_runs import (
    CP2,
    EP2,
    PP2,
    STEPS,
    TP2,
    VANILLA,
    Run,
    compare,
    losses_and_gradients,
    settings,
    short,
    train,
)

# fp32 sums in another order: a few units in the last place (6e-8) of the largest summand.
RELATIVE = 1e-5
DATA = {"reset_attention_mask": True}
MOE = {"num_ffn_experts": 8, "z_loss_coeff": 1e-3}

FOUR_LAYERS = {"num_layers": 4}
CORE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
LATENT = {"num_query_groups": None, "latent_attention": WIDTHS}
PLAIN_MOE = VANILLA | {"z_loss_coeff": None}
# Ranks, layout, and what else differs from the plainest run; one process computes nothing again.
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "tp2 ep2": (2, TP2 | EP2, {"moe": {"capacity_factor": 1.0}}),
    "cp2": (2, CP2, {}),
    "cp2 tp2": (4, CP2 | TP2, {"moe": {"balance_scope": "sequence", "capacity_factor": 0.9}}),
    "pp2 tp2 recomputed": (4, PP2 | TP2, {"training": RECOMPUTE["uniform"]}),
    "pp2 vpp2": (2, PP2 | {"virtual_pipeline_model_parallel_size": 2}, {"model": FOUR_LAYERS}),
    "ep2 attention recomputed": (2, EP2, {"training": CORE}),
    "tp2 latent": (2, TP2, {"model": LATENT}),
    "ep2 vanilla": (2, EP2, {"moe": PLAIN_MOE}),
    "pp2 vanilla": (2, PP2, {"moe": PLAIN_MOE}),
}


def raw_settings(name: str, parallel: dict[str, Any]) -> dict[str, Any]:
    others = dict(LAYOUTS[name][2])
    moe = {**MOE, **others.pop("moe", {})}
    return short(data=DATA, moe=moe, parallel=parallel, **others)


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_equals_one_process(trained, alone: Callable[..., Run], name: str) -> None:
    world, parallel, _ = LAYOUTS[name]
    run = trained(world, raw_settings(name, parallel))
    reference = raw_settings(name, {})
    reference["training"] = short()["training"]
    compare(run, alone(reference), RELATIVE)


def test_combined_schedule(ranks: RankPools) -> None:
    run, reference = both(ranks, 2, train, data=DATA, parallel=EP2)
    compare(run, reference, 0.0)


LENGTHS = (20, 25)
LENGTH = 48


def two_documents(config: Any, is_packed: bool) -> tuple[dict[str, Any], Any]:
    """In one sequence or in one each, with padding behind."""
    import torch

    from moepp_megatron.model.document_attention import dense_mask

    generator = torch.manual_seed(5)
    texts = [torch.randint(config.model.vocab_size, (n + 1,), generator=generator) for n in LENGTHS]
    rows = [texts] if is_packed else [[text] for text in texts]
    tokens, labels, documents = (torch.zeros(len(rows), LENGTH, dtype=torch.int64) for _ in "123")
    padding = torch.ones(len(rows), LENGTH, dtype=torch.bool)
    for row, own in enumerate(rows):
        start = 0
        for number, text in enumerate(own):
            where = row, slice(start, start + len(text) - 1)
            tokens[where], labels[where], padding[where] = text[:-1], text[1:], False
            documents[where] = number + 1
            start = where[1].stop
    batch = {"input_ids": tokens, "attention_mask": dense_mask(documents), "labels": labels}
    return batch | {"padding_mask": padding}, ~padding


@pytest.mark.parametrize("model", [{}, LATENT], ids=["plain", "latent"])
def test_documents_of_a_sequence_are_as_each_by_itself(ranks, model: dict[str, Any]) -> None:
    """Losses and gradients, those of balance loss and z-loss included."""
    moe = {"balance_coeff": 0.1, "z_loss_coeff": 0.1}
    raw = settings(moe=moe, model={"seq_length": LENGTH, **model})
    packed, alone = (
        ranks(1).run(losses_and_gradients, raw, partial(two_documents, is_packed=is_packed))[0]
        for is_packed in (True, False)
    )
    assert packed.keys() == alone.keys()
    for name, expected in alone.items():
        apart = np.abs(packed[name] - expected).max()
        assert apart <= RELATIVE * np.abs(expected).max(), name
        # A few tokens do not reach every expert.
        assert expected.any() or ".local_experts." in name, f"{name} compares nothing"


def masks_of_text(raw: dict[str, Any], eod: int | None) -> tuple[Any, Any]:
    """Tokens and mask of the first micro-batch of plain text, where a tokenizer ends documents."""
    from types import SimpleNamespace

    from moepp_megatron.config import Layout, parse_config
    from moepp_megatron.runtime.distributed import build_groups
    from moepp_megatron.training.batches import rank_batches
    from tests.parallel.training_runs import SyntheticDataset

    class Text(SyntheticDataset):
        def __getitem__(self, index: int) -> dict[str, Any]:
            sample = super().__getitem__(index)
            return {key: value for key, value in sample.items() if key != "documents"}

    config = parse_config(raw)
    build_groups(config, Layout.from_config(config, 1))
    dataset = Text(config, STEPS)
    if eod is not None:
        dataset.config = SimpleNamespace(tokenizer=SimpleNamespace(eod=eod))
    batch = next(rank_batches(dataset, 0, config, 1)[0])
    return batch["tokens"].numpy(), batch["attention_mask"].numpy()


@pytest.mark.parametrize("eod", [None, 10])
def test_text_is_masked_as_by_megatron_cores_dataset(ranks: RankPools, eod: int | None) -> None:
    import torch
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    ((tokens, masks),) = ranks(1).run(masks_of_text, settings(data=DATA), eod)
    resets = eod is not None
    assert not resets or (tokens == eod).any()
    for row, mask in zip(torch.from_numpy(tokens), masks, strict=True):
        expected, *_ = _get_ltor_masks_and_position_ids(row, eod, False, resets, False, True)
        assert np.array_equal(mask, expected.numpy())
