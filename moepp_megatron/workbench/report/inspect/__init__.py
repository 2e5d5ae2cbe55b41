"""The page of `moepp inspect`: a text coloured by the experts of its tokens.

packed.py  the data of the page's script: tokens, selections, gates and losses as one JSON object
page.py    puts tables, plots and the packed tokens into the page's template
plots.py   plots of the page: by layer, by position in the window, by frequency, loss by FFN experts
tables.py  turns groups of tokens into table rows, for one model or for two with their difference
"""

from moepp_megatron.workbench.report.inspect.page import write_inspection

__all__ = ["write_inspection"]
