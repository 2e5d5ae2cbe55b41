"""A run's page: plots and numbers from ``config.yaml`` and ``metrics.jsonl`` alone."""

from moepp_megatron.workbench.report.page import build_report
from moepp_megatron.workbench.report.run_data import ReportError

__all__ = ["ReportError", "build_report"]
