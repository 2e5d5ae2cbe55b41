"""The page of `moepp inspect`: a text coloured by the experts of its tokens."""

from moepp_megatron.workbench.report.inspect.page import write_inspection

__all__ = ["write_inspection"]
