"""MoE++ settings of a Megatron-LM run: `--moepp-*` for what Megatron's arguments lack.

Settings for which Megatron has an argument keep it. They are read from the `TransformerConfig` that
Megatron builds:

    --num-experts                      F, the FFN experts only
    --moe-router-topk                  K
    --moe-aux-loss-coeff               beta of the balance loss
    --moe-router-load-balancing-type   aux_loss, seq_aux_loss or global_aux_loss (the micro-batch,
                                       each sequence or the global batch), or none
    --moe-router-score-function        softmax, sigmoid or sqrtsoftplus
    --moe-router-topk-scaling-factor   factor on the gates
"""

import argparse
import os
import shlex
import sys
from typing import NoReturn

from megatron.core.transformer.transformer_config import TransformerConfig

from moepp_megatron.layer_settings import DECLARED, SCOPES, BalanceScope
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.upstream_settings import refuse_ignored
from moepp_megatron.runtime.printable import printable

ENVIRONMENT = "MOEPP_ARGS"

# Megatron has arguments for the first eight; the others have no place in its loop, but for the
# gating residual, which `--moepp-no-gating-residual` turns off.
_NOT_OWN = {
    "num_ffn_experts",
    "router_topk",
    "balance_coeff",
    "balance_scope",
    "score_function",
    "gate_scale",
    "num_groups",
    "group_topk",
    "constants_shared",
    "fused",
    "gating_residual",
}
OWN_SETTINGS = tuple(name for name in DECLARED if name not in _NOT_OWN)
"""Settings that are `--moepp-*` arguments; those that are true or false are flags."""

_IN_PLACE_OF = {
    "capacity_factor": "--moe-expert-capacity-factor",
    "gate_normalization": "--moe-router-pre-softmax",
}

# Of arguments of Megatron's that mean something else with MoE++ layers.
_MEANINGS = {
    "moe_aux_loss_coeff": "MoE++: beta of the paper's loss, which is K/E of Megatron's (E all "
    "experts, K --moe-router-topk); for the strength of Megatron's 0.01 use 0.01 E/K.",
    "log_throughput": "MoE++: counts K FFN experts per token, of which only the FFN share is "
    "computed; the true figure is lower.",
    "num_experts": "MoE++: FFN experts only.",
}


def add_moepp_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--moepp-*` to a parser: an `extra_args_provider` of Megatron's `parse_args`."""
    group = parser.add_argument_group(title="MoE++")
    for name in OWN_SETTINGS:
        declared = DECLARED[name]
        default, text = declared.default, f"{declared.says.description}."
        if name in _IN_PLACE_OF:
            text += f" In place of {_IN_PLACE_OF[name]}."
        if declared.type is bool:
            group.add_argument(option(name), action="store_true", help=text)
            continue
        group.add_argument(
            option(name),
            type=type(default) if default is not None else float,
            default=default,
            choices=declared.choices or None,
            help=f"{text} Default: {default}.",
        )
    group.add_argument(
        "--moepp-no-gating-residual",
        action="store_false",
        dest="moepp_gating_residual",
        help="Routers do not see the logits of the MoE layer before.",
    )
    _amend_help(parser)
    return parser


def moepp_config(
    config: TransformerConfig, args: argparse.Namespace, *, is_spec: bool = False
) -> MoEPPConfig:
    """The layer's settings from Megatron's configuration and arguments.

    Args:
        config: Megatron's configuration from its own arguments.
        args: Megatron's arguments. Where its parser had no `--moepp-*`, as in Megatron-LM's own
            `pretrain_gpt.py`, they are read from the environment variable MOEPP_ARGS, such as
            `MOEPP_ARGS="--moepp-tau 0.5"`.
        is_spec: Whether Megatron-LM's own `pretrain_gpt.py` makes the batches.

    Raises:
        ValueError: If settings contradict each other or MoE++ cannot honour one.
    """
    moepp_args = _own_arguments(args)
    _refuse_unsupported(config, args)
    _refuse_local_context_parallelism(config, args, is_spec)
    scope, beta = balance_of(config)
    gate_scale = config.moe_router_topk_scaling_factor
    moepp = MoEPPConfig(
        num_ffn_experts=config.num_moe_experts,
        router_topk=config.moe_router_topk,
        balance_coeff=beta,
        balance_scope=scope,
        score_function=config.moe_router_score_function,
        gate_scale=1.0 if gate_scale is None else gate_scale,
        num_groups=config.moe_router_num_groups or 1,
        # Megatron limits nothing where this one is not given.
        group_topk=config.moe_router_group_topk or config.moe_router_num_groups or 1,
        gating_residual=moepp_args.moepp_gating_residual,
        **{name: getattr(moepp_args, f"moepp_{name}") for name in OWN_SETTINGS},
    )
    # What a layer would refuse is better said now than by a rank that builds its layers.
    refuse_ignored(config, moepp)
    return moepp


def refuse(error: Exception) -> NoReturn:
    """End this process like every wrong configuration: exit code 2, one line on rank 0's stderr."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {printable(str(error))}", file=sys.stderr)
    sys.exit(2)


def option(name: str) -> str:
    """The argument of a setting."""
    return f"--moepp-{name.replace('_', '-')}"


def _amend_help(parser: argparse.ArgumentParser) -> None:
    """Change Megatron's help to the meaning here, and escape a percent sign of 0.19.2."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        meaning = _MEANINGS.get(action.dest)
        if meaning is not None:
            action.help = f"{action.help or ''} {meaning}".strip()
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = str(action.help).replace("%", "%%")


def environment_arguments(text: str) -> argparse.Namespace:
    """The settings of `MOEPP_ARGS`."""
    parser = argparse.ArgumentParser(prog=ENVIRONMENT, add_help=False, allow_abbrev=False)
    return add_moepp_arguments(parser).parse_args(shlex.split(text))


def _own_arguments(args: argparse.Namespace) -> argparse.Namespace:
    text = os.environ.get(ENVIRONMENT, "")
    if not hasattr(args, "moepp_tau"):
        # Megatron keeps its arguments in its checkpoints, so `moepp convert megatron-lm` finds it.
        args.moepp_environment = text
        return environment_arguments(text)
    if text:
        raise ValueError(
            f"{ENVIRONMENT} ({text}) must be unset where the command line takes --moepp-*; "
            "give its settings there"
        )
    return args


def _refuse_unsupported(config: TransformerConfig, args: argparse.Namespace) -> None:
    if config.num_moe_experts is None:
        raise ValueError(
            "--num-experts (None) must be the number of FFN experts of a MoE++ layer; use 8"
        )
    if config.multi_latent_attention:
        raise ValueError(
            "TransformerConfig.multi_latent_attention (True) must be False in Megatron-LM's loop, "
            "because only this package's own model adapts the local modules of latent "
            "attention; use False, or `moepp train`"
        )
    if config.mtp_num_layers:
        raise ValueError(
            f"TransformerConfig.mtp_num_layers ({config.mtp_num_layers}) must be None in "
            "Megatron-LM's loop, because its multi-token prediction hands no router logits to "
            "those layers; leave --mtp-num-layers out, or use `moepp train`"
        )
    trace = getattr(args, "moe_routing_trace_path", None)
    if trace is not None:
        raise ValueError(
            f"--moe-routing-trace-path ({trace}) must be absent with MoE++ layers, because "
            "Megatron's tracer writes nothing of a router that hands on its logits; leave it out, "
            "and use `moepp convert megatron-lm` and `moepp train` with routes.record"
        )


def _refuse_local_context_parallelism(
    config: TransformerConfig, args: argparse.Namespace, is_spec: bool
) -> None:
    """Refuse missing settings of the attention without Transformer Engine, all in one message."""
    ranks = getattr(config, "context_parallel_size", 1)
    if ranks == 1 or config.transformer_impl != "local":
        return
    kinds = config.cp_comm_type
    kinds = set(kinds) if isinstance(kinds, list) else {kinds}
    flags = {
        "--cp-comm-type all_gather": not kinds <= {None, "all_gather"},
        "--attention-dropout 0": config.attention_dropout > 0,
        "--no-create-attention-mask-in-dataloader": is_spec
        and getattr(args, "create_attention_mask_in_dataloader", False),
    }
    lacking = [flag for flag, lacks in flags.items() if lacks]
    if lacking:
        raise ValueError(
            f"--context-parallel-size ({ranks}) with --transformer-impl local must come with "
            f"{' '.join(lacking)}, because the attention without Transformer Engine gathers keys "
            "and values, and is causal; add this, or use Transformer Engine"
        )


def balance_of(config: TransformerConfig) -> tuple[BalanceScope, float]:
    """Scope and beta of the balance loss; ValueError if MoE++ has no such loss."""
    kind, beta = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    if kind == "none":
        return "microbatch", 0.0
    if not isinstance(kind, str) or kind not in SCOPES:
        raise ValueError(
            f"--moe-router-load-balancing-type ({kind}) must be one that MoE++ has; "
            f"use {', '.join(SCOPES)} or none"
        )
    if not isinstance(beta, (int, float)) or beta <= 0:
        raise ValueError(
            f"--moe-aux-loss-coeff ({beta}) must be one positive number with "
            f"--moe-router-load-balancing-type {kind}; use 0.01, or the type none for no balance "
            "loss"
        )
    return SCOPES[kind], float(beta)
