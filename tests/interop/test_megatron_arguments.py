"""From Megatron's arguments to the layer's settings."""

import argparse

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from moepp_megatron.interop.megatron_arguments import (
    ENVIRONMENT,
    add_moepp_arguments,
    moepp_config,
    refuse,
)
from moepp_megatron.moe.config import MoEPPConfig


def parsed(*words):
    return add_moepp_arguments(argparse.ArgumentParser()).parse_args(words)


def transformer(**changes):
    """Return Megatron's configuration: its own defaults, but for a coefficient of the loss."""
    settings = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_aux_loss_coeff": 0.01,
        "transformer_impl": "local",
    }
    return TransformerConfig(**{**settings, **changes})


def test_without_arguments_it_is_the_layer_of_the_paper():
    assert moepp_config(transformer(), parsed()) == MoEPPConfig(8)


def test_every_setting_of_the_layer_can_be_given():
    words = (
        "--moepp-num-zero-experts 2 --moepp-num-copy-experts 3 --moepp-num-constant-experts 4 "
        "--moepp-tau 0.5 --moepp-capacity-factor 1.1 --moepp-gate-normalization nonzero "
        "--moepp-expert-input-scale 2 --moepp-constant-init zero "
        "--moepp-constant-temperature 0.5 --moepp-logits-norm-std 3 --moepp-two-layer-gate "
        "--moepp-selection-bias --moepp-no-gating-residual"
    )
    config = transformer(
        moe_router_topk=3,
        moe_aux_loss_coeff=0.02,
        moe_router_load_balancing_type="seq_aux_loss",
        moe_router_score_function="sigmoid",
        moe_router_topk_scaling_factor=2.5,
    )
    expected = MoEPPConfig(
        8,
        num_zero_experts=2,
        num_copy_experts=3,
        num_constant_experts=4,
        router_topk=3,
        tau=0.5,
        balance_coeff=0.02,
        balance_scope="sequence",
        capacity_factor=1.1,
        gating_residual=False,
        gate_normalization="nonzero",
        score_function="sigmoid",
        expert_input_scale=2.0,
        constant_init="zero",
        constant_temperature=0.5,
        two_layer_gate=True,
        logits_norm_std=3.0,
        selection_bias=True,
        gate_scale=2.5,
    )
    assert moepp_config(config, parsed(*words.split())) == expected


@pytest.mark.parametrize(
    ("kind", "scope", "beta"),
    [
        ("aux_loss", "microbatch", 0.01),
        ("seq_aux_loss", "sequence", 0.01),
        ("global_aux_loss", "global", 0.01),
        ("none", "microbatch", 0.0),
    ],
)
def test_megatrons_name_of_the_loss_gives_the_scope(kind, scope, beta):
    made = moepp_config(transformer(moe_router_load_balancing_type=kind), parsed())
    assert (made.balance_scope, made.balance_coeff) == (scope, beta)


def test_a_parser_without_our_arguments_leaves_them_to_the_environment(monkeypatch):
    nothing_of_ours = argparse.Namespace(num_experts=8)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert moepp_config(transformer(), nothing_of_ours).tau == 0.75
    monkeypatch.setenv(ENVIRONMENT, "--moepp-tau 0.25 --moepp-no-gating-residual")
    made = moepp_config(transformer(), nothing_of_ours)
    assert (made.tau, made.gating_residual) == (0.25, False)
    with pytest.raises(ValueError, match=r"^MOEPP_ARGS \(--moepp-tau.*must be unset"):
        moepp_config(transformer(), parsed())


def test_an_unknown_word_in_the_environment_is_an_error(monkeypatch, capsys):
    monkeypatch.setenv(ENVIRONMENT, "--moepp-taw 0.25")
    with pytest.raises(SystemExit) as end:
        moepp_config(transformer(), argparse.Namespace())
    assert end.value.code == 2
    assert "--moepp-taw" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_moe_experts": None}, r"--num-experts \(None\) must be .*; use 8"),
        ({"moe_aux_loss_coeff": 0.0}, r"--moe-aux-loss-coeff \(0.0\) must be .*; use 0.01"),
        (
            {"moe_router_load_balancing_type": "sinkhorn"},
            r"--moe-router-load-balancing-type \(sinkhorn\) must be .*; use aux_loss",
        ),
        ({"multi_latent_attention": True}, r"multi_latent_attention \(True\).*; use False"),
        ({"moe_router_force_load_balancing": True}, r"force_load_balancing \(True\).*; use False"),
        ({"mtp_num_layers": 1}, r"mtp_num_layers \(1\).*; leave --mtp-num-layers out"),
        ({"moe_expert_capacity_factor": 1.0}, r"MoEPPConfig.capacity_factor"),
        ({"qk_l2_norm": True}, r"qk_l2_norm \(True\).*; use False"),
    ],
)
def test_what_the_layer_would_not_honour_is_refused(changes, message):
    config = transformer()
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        moepp_config(config, parsed())


@pytest.mark.parametrize(
    ("is_spec", "changes", "given", "flags"),
    [
        (
            True,
            {},
            {"create_attention_mask_in_dataloader": True},
            "--cp-comm-type all_gather --attention-dropout 0 "
            "--no-create-attention-mask-in-dataloader",
        ),
        (
            True,
            {"cp_comm_type": ["all_gather"], "attention_dropout": 0.0},
            {"create_attention_mask_in_dataloader": True},
            "--no-create-attention-mask-in-dataloader",
        ),
        (
            False,
            {"attention_dropout": 0.0},
            {"create_attention_mask_in_dataloader": True},
            "--cp-comm-type all_gather",
        ),
        (True, {"cp_comm_type": "all_gather", "attention_dropout": 0.0}, {}, None),
        (True, {"transformer_impl": "transformer_engine"}, {}, None),
        (True, {"context_parallel_size": 1}, {}, None),
    ],
)
def test_context_parallelism_without_transformer_engine_names_every_flag_at_once(
    is_spec, changes, given, flags
):
    config = transformer()
    settings = {"context_parallel_size": 2, "cp_comm_type": "p2p", "attention_dropout": 0.1}
    for name, value in {**settings, **changes}.items():
        setattr(config, name, value)
    args = parsed()
    vars(args).update(given)
    if flags is None:
        moepp_config(config, args, is_spec=is_spec)
        return
    with pytest.raises(ValueError, match=rf"must come with {flags}, because"):
        moepp_config(config, args, is_spec=is_spec)


def test_settings_of_the_environment_are_left_for_the_checkpoint(monkeypatch):
    args = argparse.Namespace()
    monkeypatch.setenv(ENVIRONMENT, "--moepp-tau 0.25")
    moepp_config(transformer(), args)
    assert args.moepp_environment == "--moepp-tau 0.25"


def test_megatrons_tracer_which_would_write_nothing_is_refused():
    args = parsed()
    args.moe_routing_trace_path = "trace"
    with pytest.raises(ValueError, match=r"--moe-routing-trace-path \(trace\) must be absent"):
        moepp_config(transformer(), args)


def test_help_can_be_printed_beside_megatrons():
    """megatron-core 0.19.2 has a help text that argparse cannot format."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--theirs", help="Headroom (1.10 = 10%).")
    parser.add_argument("--moe-aux-loss-coeff", help="Theirs.")
    text = " ".join(add_moepp_arguments(parser).format_help().split())
    assert "Headroom (1.10 = 10%)." in text
    assert "Theirs. MoE++: beta of the paper's loss, which is K/E of Megatron's" in text


@pytest.mark.parametrize(("rank", "printed"), [("0", "error: tau is wrong\n"), ("1", "")])
def test_refusal_is_one_line_and_exit_code_2(rank, printed, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as end:
        refuse(ValueError("tau is wrong"))
    assert end.value.code == 2
    assert capsys.readouterr().err == printed
