"""The page of `moepp inspect`: a text coloured by the experts of its tokens.

packed.py  the data of the page's script: tokens, selections, gates and losses as one JSON object
page.py    puts tables, the plot and the packed tokens into the page's template
"""

from moepp_megatron.tools.report.inspect.page import write_inspection

__all__ = ["write_inspection"]
