"""The records of a run: the metrics of every logged step, and their sinks."""

from moepp_megatron.observe.jsonl import JsonlSink
from moepp_megatron.observe.metrics import MetricsError, StepMetrics, read_metrics
from moepp_megatron.observe.sinks import (
    ConsoleSink,
    Sink,
    Sinks,
    SinkSettings,
    TensorBoardSink,
    open_sinks,
)

__all__ = [
    "ConsoleSink",
    "JsonlSink",
    "MetricsError",
    "Sink",
    "SinkSettings",
    "Sinks",
    "StepMetrics",
    "TensorBoardSink",
    "open_sinks",
    "read_metrics",
]
