"""The numbers that `moepp monitor --prometheus` serves, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Labels = Literal[
    "",
    "layer",
    "layer,kind",
    "expert,kind",
    "layer,ffn_experts",
    "layer,metric",
    "ffn_experts",
    "key",
    "name",
    "state",
    "rule,severity",
]


@dataclass(frozen=True)
class Exported:
    """One metric.

    Attributes:
        name: Its name at Prometheus.
        meaning: Its meaning, in one line.
        labels: Labels that distinguish its values of one run, beside ``run``: ``layer`` is the
            transformer layer from 1, ``kind`` the kind of expert, ``expert`` an expert's name,
            ``ffn_experts`` the number of FFN experts of a token, ``metric`` a name of
            ``docs/routing.md``, ``key`` a key of the record.
    """

    name: str
    meaning: str
    labels: Labels = ""


OF_RECORDS: Mapping[str, Exported] = {
    "step": Exported("moepp_step", "optimizer steps done"),
    "tokens": Exported("moepp_tokens", "tokens trained on"),
    "loss": Exported("moepp_loss", "language-model loss, nats"),
    "valid_loss": Exported("moepp_valid_loss", "validation loss of the last evaluation, nats"),
    "balance_loss": Exported("moepp_balance_loss", "balance loss without its coefficient"),
    "z_loss": Exported("moepp_z_loss", "router z-loss without its coefficient"),
    "lr": Exported("moepp_learning_rate", "learning rate"),
    "grad_norm": Exported("moepp_grad_norm", "global gradient norm before clipping"),
    "num_zeros": Exported("moepp_grad_zeros", "gradient elements that are exactly zero"),
    "skipped_steps": Exported("moepp_skipped_steps", "batches that the numerical guard refused"),
    "guard_actions": Exported("moepp_guard_actions", "actions of the routing guard in force"),
    "routing_shift": Exported("moepp_routing_shift", "routing divergence over its threshold"),
    "failed_saves": Exported("moepp_failed_saves", "checkpoints that could not be written"),
    "step_time_s": Exported("moepp_step_time_seconds", "wall time of the step"),
    "tokens_per_s": Exported("moepp_tokens_per_second", "throughput of the step"),
    "a2a_bytes": Exported("moepp_a2a_bytes", "bytes that leave their rank in the step, forward"),
    "slowest_rank": Exported("moepp_slowest_rank", "rank with the longest own time"),
    "slowest_rank_ratio": Exported("moepp_slowest_rank_ratio", "its time over the ranks' median"),
    "waiting_fraction": Exported("moepp_waiting_ratio", "share of the step spent waiting"),
    "ffn_fraction": Exported("moepp_ffn_ratio", "FFN share of all selections"),
    "ffn_target": Exported("moepp_ffn_target_ratio", "FFN share that moe.budget wants"),
    "ffn_per_token": Exported("moepp_ffn_per_token", "FFN experts a token takes"),
    "tau": Exported("moepp_tau", "weight of zero-computation experts in the balance loss"),
    "max_ffn_load": Exported("moepp_max_ffn_load_ratio", "busiest FFN expert over their mean"),
    "dropped_fraction": Exported("moepp_dropped_ratio", "share of selections dropped"),
    "mfu": Exported("moepp_mfu_ratio", "model FLOP/s over the cards' rated FLOP/s"),
    "model_tflops": Exported("moepp_model_tflops", "model TFLOP/s of a rank"),
    "energy_j": Exported("moepp_energy_joules", "energy of all cards since the record before"),
    "energy_per_token_j": Exported("moepp_energy_per_token_joules", "energy a token"),
    "gpu_hours": Exported("moepp_gpu_hours", "GPU-hours since the record before"),
    "gpu_power_w": Exported("moepp_gpu_power_watts", "power of a card, mean"),
    "gpu_utilization": Exported("moepp_gpu_utilization_ratio", "time in which a kernel ran, mean"),
    "gpu_clock_mhz": Exported("moepp_gpu_clock_megahertz", "clock of a card, mean"),
    "gpu_memory_bytes": Exported("moepp_gpu_memory_bytes", "most memory in use on a card"),
    "gpu_temperature_c": Exported("moepp_gpu_temperature_celsius", "highest of the cards"),
    "nvlink_bytes_per_s": Exported("moepp_nvlink_bytes_per_second", "NVLink traffic of a card"),
    "pcie_bytes_per_s": Exported("moepp_pcie_bytes_per_second", "PCIe traffic of a card"),
    "cpu_utilization": Exported("moepp_cpu_utilization_ratio", "share of all cores in use"),
    "host_memory_bytes": Exported("moepp_host_memory_bytes", "most host memory in use on a node"),
    "expert_share": Exported(
        "moepp_expert_share_ratio", "share of all selections, mean over layers", "expert,kind"
    ),
    "layer_expert_share": Exported(
        "moepp_layer_share_ratio", "share of a layer's selections by kind", "layer,kind"
    ),
    "layer_ffn_fraction": Exported("moepp_layer_ffn_ratio", "FFN share of a layer", "layer"),
    "layer_ffn_histogram": Exported(
        "moepp_layer_tokens_ratio", "share of tokens by FFN experts taken", "layer,ffn_experts"
    ),
    "router_health": Exported("moepp_router_health", "router health by its name", "layer,metric"),
    "loss_by_ffn": Exported(
        "moepp_loss_by_ffn", "loss of tokens by FFN experts taken, nats", "ffn_experts"
    ),
}
"""By the key of the record. Numbers under other keys are served as ``moepp_other{key="..."}``."""

OTHER = Exported("moepp_other", "a number of the record that this table does not name", "key")
MIN_FFN_LOAD = Exported(
    "moepp_layer_min_ffn_load_ratio", "idlest FFN expert of a layer over their mean", "layer"
)
PHI = Exported("moepp_phi_ratio", "FFN share wanted: under perfect balance, or the budget's")
TRAIN_ITERS = Exported("moepp_train_iters", "steps of the whole run")
RUN_INFO = Exported("moepp_run_info", "1; the label name holds run.name", "name")
STATE = Exported("moepp_run_state", "1 for the state that the run is in, else 0", "state")
RECORD_AGE = Exported("moepp_record_age_seconds", "time since the last record was written")
ALERTS = Exported("moepp_alerts", "alerts so far, by rule and severity", "rule,severity")
OF_RUN = (RUN_INFO, STATE, RECORD_AGE, TRAIN_ITERS, PHI, ALERTS)
"""Served beside the records' numbers."""


def exported_names() -> set[str]:
    """Every name that may be served."""
    return {m.name for m in (*OF_RECORDS.values(), *OF_RUN, OTHER, MIN_FFN_LOAD)}
