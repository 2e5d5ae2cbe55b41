"""The output of `moepp pilot`: a page for the person who decides, a table in the terminal."""

from moepp_megatron.workbench.experiments.pilot.report.page import write_pilot_page
from moepp_megatron.workbench.experiments.pilot.report.terminal import print_pilot

__all__ = ["print_pilot", "write_pilot_page"]
