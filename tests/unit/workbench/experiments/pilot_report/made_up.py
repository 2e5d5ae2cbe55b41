"""A pilot's result for the tests of its page; every number is made up."""

from __future__ import annotations

import math
from typing import Any

SEEDS = [1, 2, 3]
COMMAND = (
    "moepp pilot configs/quickstart.yaml --nproc 2 --out pilots/first --gpus 64 "
    "--target configs/models/moepp_7b_16_4.yaml data.path=data/mine"
)

HEALTH = {
    "gate_entropy": 1.84,
    "selection_margin": 0.041,
    "logit_variance": 1.31,
    "row_cosine_max": 0.23,
    "balance_gradient_ratio": 0.014,
    "constant_replaced": 0.31,
    "residual_ratio": 0.24,
    "max_ffn_load": 1.92,
}


def interval(mean: float, half: float | None) -> dict[str, float | None]:
    if half is None:
        return {"mean": mean, "low": None, "high": None}
    return {"mean": mean, "low": mean - half, "high": mean + half}


def outcome(
    name: str,
    kind: str,
    loss: float,
    milliseconds: float,
    *,
    tau: float | None = None,
    topk: int = 2,
    steps: int = 400,
    share: float = 1.0,
    health: dict[str, float] | None = None,
    alerts: dict[str, int] | None = None,
) -> dict[str, Any]:
    tokens = [4096 * step for step in range(1, steps + 1)]
    curve = [
        loss
        - 0.05
        + 4.5 * math.exp(-step / 30)
        + 0.6 * math.exp(-step / 200)
        + 0.04 * math.sin(step * 1.7)
        for step in range(1, steps + 1)
    ]
    is_vanilla = kind == "vanilla"
    overrides = [] if tau is None else [f"moe.tau={tau:g}"]
    return {
        "arm": {
            "name": name,
            "kind": kind,
            "tau": tau,
            "topk": topk,
            "steps": steps,
            "overrides": overrides,
        },
        "seeds": SEEDS,
        "valid_loss": interval(loss, 0.021),
        "loss_difference": None if is_vanilla else interval(loss - 3.5, 0.006),
        "step_time_s": interval(milliseconds / 1e3, 0.004),
        "time_ratio": None if kind in ("vanilla", "short") else interval(milliseconds / 800, 0.012),
        "tokens_per_s": interval(4096e3 / milliseconds, 30.0),
        "ffn_share": interval(share, 0.004),
        "a2a_bytes": interval(25.17e6 * share * topk / 2, 1e4),
        "energy_per_token_j": None,
        "alerts": alerts or {},
        "health": health or {},
        "curve": {"tokens": tokens, "loss": curve},
    }


def verdict(arm: str, factor: float, time: float, target: float | None, **answers: Any) -> Any:
    return {
        "arm": arm,
        "loss_in_time": interval(-0.038, 0.006),
        "loss_in_compute": interval(-0.0579, 0.009),
        "probability": 0.987,
        "stakes": {"adopted": 0.0004, "kept": 0.139},
        "token_factor": {"mean": factor, "low": factor / 1.03, "high": factor * 1.03},
        "time_to_loss": {"mean": time, "low": time / 1.04, "high": time * 1.04},
        "target_time_to_loss": target
        and {"mean": target, "low": target / 1.11, "high": target * 1.11},
        "at_pilot": "pays",
        "at_target": target and "undecided",
        "reasons": [
            f"{arm} needs {factor:.3f} times vanilla's tokens for its loss.",
            f"Its step takes less time, so it is there after {time:.3f} of vanilla's time.",
        ],
    } | answers


def contents() -> dict[str, Any]:
    """A pilot of three MoE++ arms with a target, that pays at tau 0.75."""
    return {
        "setting": {
            "command": COMMAND,
            "config": "quickstart",
            "nproc": 2,
            "device": "CPU (made up)",
            "cores": 2,
            "torch": "2.11.0",
            "megatron_core": "0.19.2",
            "steps": 400,
            "tokens": 1_638_400,
            "valid_tokens": 131_072,
            "parameters": 9_412_352,
            "began": "2026-11-26",
            "sessions": 5,
            "look": 1,
            "next_seeds": 6,
            "level": 0.0125,
        },
        "arms": [
            outcome("vanilla", "vanilla", 3.5, 800.0),
            outcome("MoE++ tau 0.25", "moepp", 3.543, 610.0, tau=0.25, share=0.335, health=HEALTH),
            outcome("MoE++ tau 0.5", "moepp", 3.516, 650.0, tau=0.5, share=0.501, health=HEALTH),
            outcome(
                "MoE++ tau 0.75",
                "moepp",
                3.5031,
                684.0,
                tau=0.75,
                share=0.598,
                health=HEALTH,
                alerts={"dead_expert": 2, "few_ffn_experts": 0},
            ),
            outcome("MoE++ top-3 tau 1", "more", 3.481, 812.0, tau=1.0, topk=3, share=0.667),
            outcome("MoE++ tau 0.75, vanilla's time", "equal_time", 3.462, 684.0, steps=468),
            outcome("vanilla, 304 wide", "narrow", 3.561, 640.0),
            outcome("vanilla, 70% of the steps", "short", 3.668, 800.0, steps=280),
        ],
        "token_value": interval(0.471, 0.03),
        "equal_compute": [
            {
                "arm": "MoE++ tau 0.75",
                "other": "vanilla, 304 wide",
                "loss_difference": interval(-0.0579, 0.009),
            },
            {
                "arm": "MoE++ top-3 tau 1",
                "other": "vanilla",
                "loss_difference": interval(-0.019, 0.02),
            },
        ],
        "target": {
            "name": "moepp_7b_16_4",
            "gpus": 64,
            "gpu": "h100_sxm",
            "tokens": 1e12,
            "price_per_hour": 2.5,
            "models": [
                target_model("vanilla", 1.0),
                target_model("MoE++ tau 0.5", 0.82),
                target_model("MoE++ tau 0.75", 0.879),
            ],
        },
        "verdicts": [
            verdict("MoE++ tau 0.75", 1.007, 0.861, 0.885),
            verdict("MoE++ tau 0.5", 1.035, 0.841, 0.849),
            verdict("MoE++ tau 0.25", 1.096, 0.836, None, at_pilot="undecided"),
        ],
        "recommended": "MoE++ tau 0.75",
        "answer": "MoE++ with tau 0.75 reaches vanilla's loss in 0.86 of its time here; whether it "
        "pays on 64 H100 is undecided.",
        "caveats": [
            "The pilot is small: what 1.6 million tokens show need not hold for a trillion.",
            "Two ranks on one machine: the network of a cluster is the cost model's guess.",
        ],
    }


def target_model(arm: str, ratio: float) -> dict[str, Any]:
    return {
        "arm": arm,
        "layout": "PP2 EP8, micro-batch 2",
        "fits": True,
        "step_time_s": 9.4 * ratio,
        "tokens_per_s_per_gpu": 13_000 / ratio,
        "tflops_per_gpu": 310.0,
        "a2a_bytes": 41.2e9 * ratio,
        "hours": 334.0 * ratio,
        "money": 53_440.0 * ratio,
        "time_ratio": ratio,
    }


def without_intervals(value: Any) -> Any:
    """The same with a single seed."""
    if isinstance(value, dict):
        if value.keys() == {"mean", "low", "high"}:
            return value | {"low": None, "high": None}
        changed = {key: without_intervals(one) for key, one in value.items()}
        return changed | {"seeds": [1]} if "seeds" in changed else changed
    return [without_intervals(one) for one in value] if isinstance(value, list) else value
