"""What `moepp pilot` shows: a page for whoever decides, tables in the terminal.

page.py          pilot.html, of all that follows
badges.py        the answers in a word each
forest.py        plot: time to equal loss with its intervals
speed.py         plot: loss over step time
learning.py      plots: loss over tokens
looks.py         colours and markers of the arms in all plots
labels.py        places names beside points
tables.py        the page's tables, but for
target_table.py  the models at the size of the target
stages.py        the roll-out: what to run and watch, when to go on
conditions.py    its conditions, as sentences with this pilot's numbers
commands.py      its command lines
terminal.py      what the terminal shows
numbers.py       how the numbers of all these are written
"""

from moepp_megatron.workbench.experiments.pilot.report.page import write_pilot_page
from moepp_megatron.workbench.experiments.pilot.report.terminal import print_pilot

__all__ = ["print_pilot", "write_pilot_page"]
