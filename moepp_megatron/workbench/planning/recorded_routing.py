"""The evenness of a recorded run's routing, from its `metrics.jsonl`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moepp_megatron.config import ConfigError
from moepp_megatron.config.json_file import parse_json
from moepp_megatron.file_names import METRICS_FILE
from moepp_megatron.workbench.planning.imbalance import AssumedRouting, evenness_of


def recorded_routing(source: Path, num_ffn_experts: int, topk: int) -> AssumedRouting:
    """Routing as uneven as in the second half of a run.

    Args:
        source: A run's folder or its `metrics.jsonl`.
        num_ffn_experts: FFN experts of the run, the first of `layer_expert_share`.
        topk: Selections per token.

    Raises:
        ConfigError: If there is no such file, or it has no shares of this many experts.
    """
    late = _late_steps(source, num_ffn_experts)
    # Tokens are counted from the start of the run.
    per_step = (late[-1]["tokens"] - late[0]["tokens"]) / max(late[-1]["step"] - late[0]["step"], 1)
    selections = max(round(per_step * topk * late[-1]["ffn_fraction"]), 1)
    shares = [layer[:num_ffn_experts] for line in late for layer in line["layer_expert_share"]]
    evenness = evenness_of(shares, selections)
    return AssumedRouting(evenness if evenness != float("inf") else None)


def _late_steps(source: Path, num_ffn_experts: int) -> list[dict[str, Any]]:
    """Lines of the second half of a run that hold shares."""
    path = source / METRICS_FILE if source.is_dir() else source
    try:
        lines = [parse_json(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--routing ({source}) must be a run or a metrics.jsonl ({error}); name one"
        ) from None
    steps = [line for line in lines if _shows(line, num_ffn_experts)]
    if len(steps) < 2:
        raise ConfigError(
            f"--routing ({source}) must hold layer_expert_share of at least 2 steps with "
            f"{num_ffn_experts} FFN experts; name a run of this model's experts"
        )
    return steps[len(steps) // 2 :]


def _shows(line: Any, num_ffn_experts: int) -> bool:
    if not isinstance(line, dict) or not line.get("layer_expert_share"):
        return False
    layers = line["layer_expert_share"]
    return (
        all(len(layer) >= num_ffn_experts and sum(layer[:num_ffn_experts]) > 0 for layer in layers)
        and {"tokens", "step", "ffn_fraction"} <= line.keys()
    )
