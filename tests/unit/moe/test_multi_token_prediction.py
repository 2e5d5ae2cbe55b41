"""Multi-token prediction in one process: against its parts called by hand, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from torch import Tensor

from moepp_megatron.model.gpt import MoEPPGPTModel
from moepp_megatron.model.initialize import initialize_weights
from moepp_megatron.model.local_modules import fit_local_modules
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.layer import moe_statistics, moepp_layers
from moepp_megatron.moe.multi_token import get_moepp_mtp_block_spec
from moepp_megatron.moe.spec import get_moepp_block_spec
from tests.parallel.training_runs import FULL
from tests.unit.moe.builders import SEQUENCE, VOCAB, assert_close, megatron_config, randomize

DEPTHS, WEIGHT, BATCH = 2, 0.3, 3
MOEPP = MoEPPConfig(num_ffn_experts=4, balance_coeff=0.0)


def build(moepp: MoEPPConfig = MOEPP, depths: int = DEPTHS, **changes: Any) -> MoEPPGPTModel:
    config = megatron_config(
        moepp, mtp_num_layers=depths, mtp_loss_scaling_factor=WEIGHT, **changes
    )
    spec = {"use_transformer_engine": False, "adapt": fit_local_modules}
    model = MoEPPGPTModel(
        config,
        get_moepp_block_spec(config, moepp, **spec),
        moepp=moepp,
        mtp_block_spec=get_moepp_mtp_block_spec(config, moepp, **spec),
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
    )
    initialize_weights([model], 7)
    randomize(model, 0.2)
    return model


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids, positions, labels and a loss mask with holes, [b, s]."""
    tokens = torch.randint(VOCAB, (BATCH, SEQUENCE + 1))
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    return (
        tokens[:, :-1].contiguous(),
        positions,
        tokens[:, 1:].contiguous(),
        (torch.rand(BATCH, SEQUENCE) < 0.7).float(),
    )


def ahead(values: Tensor, places: int) -> Tensor:
    """[b, s] moved to the left, zeros behind."""
    return F.pad(values[:, places:], (0, places))


def by_hand(model: MoEPPGPTModel, ids: Tensor, labels: Tensor, mask: Tensor) -> list[Tensor]:
    """Loss of each depth, 0 first, of the tokens together; the modules called one by one."""
    decoder, rope = model.decoder, model.rotary_pos_emb(SEQUENCE)
    for layer in [*decoder.layers, *(depth.mtp_model_layer for depth in model.mtp.layers)]:
        layer.lane_width = 0
    decoder.final_layernorm._forward_pre_hooks.clear()
    decoder.final_layernorm._forward_hooks.clear()
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)

    def loss(states: Tensor, places: int) -> Tensor:
        logits = model.output_layer(states)[0].transpose(0, 1)
        losses = F.cross_entropy(
            logits.flatten(0, 1), ahead(labels, places).flatten(), reduction="none"
        )
        return (losses.view(BATCH, SEQUENCE) * ahead(mask, places)).sum()

    hidden, lane = model.embedding(ids, positions), None
    for layer in decoder.layers:
        hidden, lane = layer(hidden, lane, attention_mask=None, rotary_pos_emb=rope)
    hidden = decoder.final_layernorm(hidden)
    found = [loss(hidden, 0)]
    for places, depth in enumerate(model.mtp.layers, start=1):
        further = model.embedding(ahead(ids, places), positions)
        joined = torch.cat([depth.enorm(further), depth.hnorm(hidden)], dim=-1)
        # The lane is that of the same position, one layer before.
        hidden, lane = depth.mtp_model_layer(
            F.linear(joined, depth.eh_proj.weight), lane, attention_mask=None, rotary_pos_emb=rope
        )
        hidden = depth.final_layernorm(hidden)
        found.append(loss(hidden, places))
    return found


@pytest.mark.parametrize(
    "changes",
    [{}, FULL],
    ids=["kept", "layers again"],
)
@pytest.mark.parametrize(
    "moepp",
    [
        MOEPP,
        dataclasses.replace(MOEPP, gating_residual=False),
        dataclasses.replace(MOEPP, gate_normalization="nonzero", router_topk=3),
    ],
    ids=["residual", "no residual", "three experts"],
)
def test_loss_and_gradients_are_those_of_its_parts(
    moepp: MoEPPConfig, changes: dict[str, Any]
) -> None:
    model, other = build(moepp, **changes), build(moepp)
    other.load_state_dict(model.state_dict())
    ids, positions, labels, mask = batch()
    MTPLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    losses = model(ids, positions, None, labels=labels, loss_mask=mask)
    (losses * mask).sum().backward()
    main, *further = by_hand(other, ids, labels, mask)
    (main + WEIGHT / DEPTHS * sum(further)).backward()
    assert_close((losses * mask).sum(), main, "loss")
    sums = model.further_loss.sums
    assert sums is not None
    assert_close(sums[:, 0].float(), torch.stack(further).detach(), "losses of further tokens")
    assert sums[:, 1].tolist() == [ahead(mask, k).sum().item() for k in (1, 2)]
    expected = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name].grad, f"gradient of {name}")


def test_its_routers_are_the_decoders_next() -> None:
    model = build()
    assert [layer.layer_number for layer in moepp_layers(model)] == [1, 2, 3, 4, 5]
    assert sorted(moe_statistics(model)) == [1, 2, 3, 4, 5]
    residuals = [layer.router.residual_weight is not None for layer in moepp_layers(model)]
    assert residuals == [False, True, True, True, True]
    ids, positions, labels, _ = batch()
    model(ids, positions, None, labels=labels).sum().backward()
    for number, statistics in moe_statistics(model).items():
        assert statistics.selected.sum() == BATCH * SEQUENCE * 2, f"layer {number}"


def test_without_gradients_they_do_not_run() -> None:
    model, plain = build(), build(depths=0)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "mtp" not in k})
    ids, positions, labels, _ = batch()
    for depth in model.mtp.layers:
        depth.register_forward_pre_hook(lambda *_: pytest.fail("an MTP layer ran"))
    with torch.no_grad():
        logits = model(ids, positions, None)
        losses = model(ids, positions, None, labels=labels)
        assert torch.equal(logits, plain(ids, positions, None))
        assert torch.equal(losses, plain(ids, positions, None, labels=labels))
    assert model.further_loss.sums is None


def test_megatron_cores_own_mtp_layers_are_refused() -> None:
    config = megatron_config(MOEPP, mtp_num_layers=1)
    spec = get_moepp_block_spec(config, MOEPP, use_transformer_engine=False)
    theirs = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    with pytest.raises(ValueError, match="must come with mtp_block_spec=get_moepp_mtp_block_spec"):
        GPTModel(
            config,
            spec,
            vocab_size=VOCAB,
            max_sequence_length=SEQUENCE,
            position_embedding_type="rope",
            mtp_block_spec=theirs,
        )
