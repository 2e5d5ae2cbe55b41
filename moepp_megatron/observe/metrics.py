"""The record of one logged step, and reading a run's ``metrics.jsonl``."""

import math
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError


class MetricsError(ValueError):
    """A ``metrics.jsonl`` is missing, empty or damaged; the message is one line."""


def _null_to_nan(value: object) -> object:
    """Replace null by NaN: JSON has no NaN or infinity, so they are written as null."""
    return math.nan if value is None else value


Number = Annotated[float, BeforeValidator(_null_to_nan)]


class StepMetrics(BaseModel):
    """One logged step, global over the batch and all ranks (one line of ``metrics.jsonl``).

    Every value is that of the step itself. Further keys may be given; they are kept. Non-finite
    numbers are written as ``null``, so that every line is standard JSON.

    Attributes:
        step: Optimizer steps done, this one included.
        tokens: Tokens trained on since the beginning of the run, this step included.
        loss: Language-model loss alone, token mean over the global batch, nats.
        lr: Learning rate of this step.
        grad_norm: Global gradient norm before clipping.
        step_time_s: Wall time of the step, seconds.
        tokens_per_s: Tokens of the global batch over ``step_time_s``.
        balance_loss: Heterogeneous load-balance loss without its coefficient, mean over MoE layers.
        ffn_fraction: FFN share of all K*T selections, mean over MoE layers.
        ffn_per_token: FFN experts per token, mean over tokens and MoE layers.
        expert_share: [E] share of all selections of each expert, mean over MoE layers; sums to 1;
            order of ``EXPERT_KINDS``.
        max_ffn_load: Busiest FFN expert's selections over the FFN experts' mean.
        dropped_fraction: Share of all selections dropped by a capacity limit.
        a2a_bytes: Bytes of hidden vectors that leave their rank through the dispatcher, all ranks
            and MoE layers, forward.
        ffn_target: Target of the FFN share from ``moe.budget`` in this step; only with a
            budget.
        tau: Weight of zero-computation experts in the balance loss, mean over MoE layers; only with
            a budget, or if the routing guard has raised it.
        valid_loss: Validation loss, nats; only on evaluated steps.
        layer_expert_share: [MoE layers][E] ``expert_share`` of each layer.
        layer_ffn_fraction: [MoE layers] ``ffn_fraction`` of each layer.
        router_health: Metric to [MoE layers] of ``docs/routing.md``; only on measured steps
            (``observe.health_interval``), as the next two.
        layer_ffn_histogram: [MoE layers][K + 1] share of the tokens with 0, 1, ..., K FFN experts.
        loss_by_ffn: [K + 1] mean language-model loss of the tokens with 0, 1, ..., K FFN experts on
            average over the last pipeline stage's MoE layers, rounded; NaN where there is none.
        z_loss: Router z-loss, mean over MoE layers, without its coefficient.
        num_zeros: Gradient elements that are exactly zero.
        skipped_steps: Batches that the numerical guard refused since the run began; they are
            neither steps nor in ``tokens``.
        slowest_rank: Rank with the longest own time; only on steps where ranks are compared.
        slowest_rank_ratio: Its own time over the ranks' median.
        waiting_fraction: Share of the step time that ranks wait for collectives, their mean; only
            on steps where ranks are compared.
        guard_actions: Places (a rule in a layer, or in the whole model) in which an action of the
            routing guard beyond warning was in force in this step, or in a dry run would have been;
            only with ``routing_guard.enabled``.
        routing_shift: Divergence of the routing profile over its threshold; only on steps where one
            is judged.
        failed_saves: Checkpoints that could not be written so far; only where any are.
        mfu: Model FLOP/s (`config/flops.py`) over the rated dense FLOP/s of all GPUs.
        model_tflops: Model TFLOP/s of a rank.
        energy_j: Energy of all GPUs since the record before, J, including
            evaluation and saving; like the next two only if NVML reports it.
        energy_per_token_j: ``energy_j`` over the tokens trained on since the record before.
        gpu_hours: Hours since the record before times the number of GPUs.
        gpu_power_w: Power of a GPU, mean over GPUs and time since the record before; so are
            the next two.
        gpu_utilization: Share of the time in which a kernel ran.
        gpu_clock_mhz: Clock of the multiprocessors.
        gpu_memory_bytes: Most memory in use on any GPU, other processes included.
        gpu_temperature_c: Highest temperature of any GPU, degrees Celsius.
        nvlink_bytes_per_s: NVLink traffic of a GPU, sent and received, mean over GPUs.
        pcie_bytes_per_s: PCIe traffic of a GPU, sent and received, mean over GPUs.
        cpu_utilization: Share of all cores of a node in use, mean over nodes without a GPU.
        host_memory_bytes: Most host memory in use on any node without a GPU.
    """

    model_config = ConfigDict(extra="allow", frozen=True, ser_json_inf_nan="null")

    step: int
    tokens: int
    loss: Number
    lr: Number
    grad_norm: Number
    step_time_s: Number
    tokens_per_s: Number
    balance_loss: Number
    ffn_fraction: Number
    ffn_per_token: Number
    expert_share: list[Number]
    max_ffn_load: Number
    dropped_fraction: Number
    a2a_bytes: int
    ffn_target: float | None = None
    tau: float | None = None
    valid_loss: float | None = None
    layer_expert_share: list[list[Number]] | None = None
    layer_ffn_fraction: list[Number] | None = None
    router_health: dict[str, list[Number]] | None = None
    layer_ffn_histogram: list[list[Number]] | None = None
    loss_by_ffn: list[Number] | None = None
    z_loss: float | None = None
    num_zeros: int | None = None
    skipped_steps: int | None = None
    slowest_rank: int | None = None
    slowest_rank_ratio: float | None = None
    waiting_fraction: float | None = None
    guard_actions: int | None = None
    routing_shift: float | None = None
    failed_saves: int | None = None
    mfu: float | None = None
    model_tflops: float | None = None
    energy_j: float | None = None
    energy_per_token_j: float | None = None
    gpu_hours: float | None = None
    gpu_power_w: float | None = None
    gpu_utilization: float | None = None
    gpu_clock_mhz: float | None = None
    gpu_memory_bytes: int | None = None
    gpu_temperature_c: float | None = None
    nvlink_bytes_per_s: float | None = None
    pcie_bytes_per_s: float | None = None
    cpu_utilization: float | None = None
    host_memory_bytes: int | None = None

    def to_json_line(self) -> str:
        """One line of JSON with its line end; optional values that are None are left out."""
        return self.model_dump_json(exclude_none=True) + "\n"


def read_metrics(path: Path) -> list[StepMetrics]:
    """Reads a run's ``metrics.jsonl``.

    A last line that a killed run left unfinished is ignored. If steps were repeated after a
    restart, the later records count.

    Args:
        path: The file.

    Returns:
        At least one record, steps strictly increasing.

    Raises:
        MetricsError: The file is missing, has no complete record, or a line is not a record.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MetricsError(
            f"{path}: cannot be read ({error.strerror}); name the folder of a run that "
            "`moepp train` has started"
        ) from error
    records = parse_metrics(content, str(path))
    if not records:
        raise MetricsError(
            f"{path}: has no complete record yet; wait for the first logged step "
            "(training.log_interval)"
        )
    return records


def parse_metrics(content: bytes, source: str) -> list[StepMetrics]:
    """Parses the bytes of a ``metrics.jsonl``; see ``read_metrics``.

    Args:
        content: The file's bytes, possibly none.
        source: Name of the file in errors.

    Raises:
        MetricsError: A line other than an unfinished last one is not a record.
    """
    records, damaged = scan_metrics(content)
    for number, reason in damaged.items():
        raise MetricsError(f"{source}:{number}: {reason}")
    return records


def scan_metrics(content: bytes) -> tuple[list[StepMetrics], dict[int, str]]:
    """The records of a ``metrics.jsonl``, and the errors of invalid lines.

    Args:
        content: The file's bytes, possibly none.

    Returns:
        Records with strictly increasing steps; line number (from 1) to reason. An unfinished last
        line is in neither.
    """
    lines = content.split(b"\n")
    records: list[StepMetrics] = []
    damaged: dict[int, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = StepMetrics.model_validate_json(line)
        except ValidationError as error:
            # Only an interrupted write leaves bytes after the last line end.
            if number < len(lines):
                damaged[number] = _describe(error)
            continue
        while records and records[-1].step >= record.step:
            records.pop()
        records.append(record)
    return records, damaged


def _describe(error: ValidationError) -> str:
    """The first problem of a line, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    if not first["loc"]:
        return f"is not a JSON object ({first['msg']}); remove the line"
    key = ".".join(str(part) for part in first["loc"])
    return f"{key}: {first['msg']}; every record needs the keys of StepMetrics"
