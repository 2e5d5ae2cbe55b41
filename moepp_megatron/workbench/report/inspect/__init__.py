"""The page of `moepp inspect`: a text coloured by what its tokens took."""

from moepp_megatron.workbench.report.inspect.page import write_inspection

__all__ = ["write_inspection"]
