"""Multi-token prediction in one process: against its parts called by hand, and what is refused."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

from moepp_megatron.model.gpt import MoEPPGPTModel
from moepp_megatron.model.initialize import initialize_weights
from moepp_megatron.model.local_modules import fit_local_modules
from moepp_megatron.moe import reference
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.layer import moe_statistics, moepp_layers
from moepp_megatron.moe.multi_token import get_moepp_mtp_block_spec
from moepp_megatron.moe.spec import get_moepp_block_spec
from tests.parallel.training_runs import FULL
from tests.unit.moe.builders import (
    SEQUENCE,
    VOCAB,
    assert_close,
    megatron_config,
    randomize,
    tested_version_only,
)

pytestmark = tested_version_only

DEPTHS, WEIGHT, BATCH = 2, 0.3, 3
MOEPP = MoEPPConfig(4, balance_coeff=0.0)


def build(moepp=MOEPP, depths=DEPTHS, **changes):
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


def batch():
    """Token ids, positions, labels and a loss mask with holes, [b, s]."""
    tokens = torch.randint(VOCAB, (BATCH, SEQUENCE + 1))
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    return (
        tokens[:, :-1].contiguous(),
        positions,
        tokens[:, 1:].contiguous(),
        (torch.rand(BATCH, SEQUENCE) < 0.7).float(),
    )


def ahead(values, places):
    """[b, s] moved to the left, zeros behind."""
    return F.pad(values[:, places:], (0, places))


def padding_ahead(padding, places):
    """[b, s] where the token so many places ahead is padding, or lies beyond the end."""
    return None if padding is None else F.pad(padding[:, places:], (0, places), value=True)


def by_hand(model, ids, labels, mask, padding=None):
    """Loss of each depth, 0 first, of the tokens together; the modules called one by one."""
    decoder, rope = model.decoder, model.rotary_pos_emb(SEQUENCE)
    for layer in [*decoder.layers, *(depth.mtp_model_layer for depth in model.mtp.layers)]:
        layer.lane_width = 0
    decoder.final_layernorm._forward_pre_hooks.clear()
    decoder.final_layernorm._forward_hooks.clear()
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)

    def loss(states, places):
        logits = model.output_layer(states)[0].transpose(0, 1)
        losses = F.cross_entropy(
            logits.flatten(0, 1), ahead(labels, places).flatten(), reduction="none"
        )
        return (losses.view(BATCH, SEQUENCE) * ahead(mask, places)).sum()

    hidden, lane = model.embedding(ids, positions), None
    for layer in decoder.layers:
        hidden, lane = layer(
            hidden, lane, attention_mask=None, rotary_pos_emb=rope, padding_mask=padding
        )
    hidden = decoder.final_layernorm(hidden)
    found = [loss(hidden, 0)]
    for places, depth in enumerate(model.mtp.layers, start=1):
        further = model.embedding(ahead(ids, places), positions)
        joined = torch.cat([depth.enorm(further), depth.hnorm(hidden)], dim=-1)
        # The lane is that of the same position, one layer before.
        hidden, lane = depth.mtp_model_layer(
            F.linear(joined, depth.eh_proj.weight),
            lane,
            attention_mask=None,
            rotary_pos_emb=rope,
            padding_mask=padding_ahead(padding, places),
        )
        hidden = depth.final_layernorm(hidden)
        found.append(loss(hidden, places))
    return found


# Unequal ends, an end that is no padding, and padding between tokens.
PADDING = torch.arange(SEQUENCE) >= torch.tensor([[SEQUENCE - 4], [SEQUENCE], [SEQUENCE - 1]])
PADDING[1, 3:5] = True
LOSSES = dataclasses.replace(MOEPP, balance_coeff=0.1, capacity_factor=0.9)


@pytest.fixture
def aux_losses_count():
    MTPLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    yield
    MoEAuxLossAutoScaler.main_loss_backward_scale = None


CASES = {
    "residual": (MOEPP, None),
    "no residual": (dataclasses.replace(MOEPP, gating_residual=False), None),
    "three experts": (
        dataclasses.replace(MOEPP, gate_normalization="nonzero", router_topk=3),
        None,
    ),
    # With the balance loss, z-loss and a capacity.
    "padding": (LOSSES, PADDING),
    "padding, by sequence": (dataclasses.replace(LOSSES, balance_scope="sequence"), PADDING),
    "padding, no residual": (dataclasses.replace(LOSSES, gating_residual=False), PADDING),
}


@pytest.mark.usefixtures("aux_losses_count")
@pytest.mark.parametrize("changes", [{}, FULL], ids=["kept", "layers again"])
@pytest.mark.parametrize(("moepp", "padding"), CASES.values(), ids=CASES)
def test_loss_and_gradients_are_those_of_its_parts(moepp, padding, changes):
    """Padding moves with the tokens."""
    z_loss = None if padding is None else 0.1
    model = build(moepp, moe_z_loss_coeff=z_loss, **changes)
    other = build(moepp, moe_z_loss_coeff=z_loss)
    other.load_state_dict(model.state_dict())
    ids, positions, labels, mask = batch()
    if padding is not None:
        mask = mask * ~padding
    losses = model(ids, positions, None, labels=labels, loss_mask=mask, padding_mask=padding)
    (losses * mask).sum().backward()
    main, *further = by_hand(other, ids, labels, mask, padding)
    (main + WEIGHT / DEPTHS * sum(further)).backward()
    assert_close((losses * mask).sum(), main, "loss")
    sums = model.mtp_loss.sums
    assert_close(sums[:, 0].float(), torch.stack(further).detach(), "losses of further tokens")
    assert sums[:, 1].tolist() == [ahead(mask, k).sum().item() for k in (1, 2)]
    expected = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name].grad, f"gradient of {name}")


def test_routers_of_further_tokens_are_the_reference_without_padding():
    """In fp64, over the tokens that are none: selections, limits, balance loss and z-loss."""
    model = build(LOSSES, moe_z_loss_coeff=0.1)
    residuals = [layer.router.residual_weight is not None for layer in moepp_layers(model)]
    assert residuals == [False, True, True, True, True]
    seen = {}
    for layer in moepp_layers(model):
        layer.router.register_forward_hook(
            lambda _, given, routing, number=layer.layer_number: seen.update(
                {number: (given, routing)}
            )
        )
    ids, positions, labels, mask = batch()
    model(ids, positions, None, labels=labels, loss_mask=mask, padding_mask=PADDING)
    recorded = get_moe_metrics_tracker().metrics["z_loss"].values
    assert sorted(moe_statistics(model)) == [1, 2, 3, 4, 5]
    for number, statistics in moe_statistics(model).items():
        depth = max(0, number - 3)
        padded = padding_ahead(PADDING, depth)
        assert padded is not None
        real = (~padded).T.flatten()
        (hidden, previous, *_), routing = seen[number]
        router = model.get_submodule(
            f"mtp.layers.{depth - 1}.mtp_model_layer" if depth else f"decoder.layers.{number - 1}"
        ).mlp.router
        logits = hidden.flatten(0, 1)[real].double() @ router.weight.double().T
        if router.residual_weight is not None:
            logits += previous.flatten(0, 1)[real].double() @ router.residual_weight.double().T
        gates, selected, scores = reference.select_experts(logits, LOSSES)
        kept = reference.within_capacity(gates, selected, LOSSES)
        assert statistics.num_tokens == real.sum() < BATCH * SEQUENCE
        assert torch.equal(statistics.selected, selected.sum(dim=0)), f"layer {number}"
        assert torch.equal(routing.routing_map[real], kept)
        assert not routing.routing_map[~real].any()
        assert not routing.logits.flatten(0, 1)[~real].any()
        balance = reference.balance_loss(scores, selected, LOSSES)
        assert_close(statistics.balance_loss, balance.float(), f"balance loss of layer {number}")
        z_loss = logits.logsumexp(-1).square().mean()
        assert_close(recorded[number - 1], z_loss.float(), f"z-loss of layer {number}")


def test_without_gradients_they_do_not_run():
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
    assert model.mtp_loss.sums is None


def test_megatron_cores_own_mtp_layers_are_refused():
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
