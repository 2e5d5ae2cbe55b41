"""The records of a run: the metrics of every logged step, and their sinks."""

from moepp_megatron.observe.expert_names import EXPERT_KINDS, ExpertCounts
from moepp_megatron.observe.jsonl import JsonlSink
from moepp_megatron.observe.metrics import MetricsError, StepMetrics, read_metrics
from moepp_megatron.observe.sinks import (
    ConsoleSink,
    Sink,
    Sinks,
    TensorBoardSink,
    open_sinks,
)

__all__ = [
    "EXPERT_KINDS",
    "ConsoleSink",
    "ExpertCounts",
    "JsonlSink",
    "MetricsError",
    "Sink",
    "Sinks",
    "StepMetrics",
    "TensorBoardSink",
    "open_sinks",
    "read_metrics",
]
