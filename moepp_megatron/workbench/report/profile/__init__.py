"""The output of `moepp profile`: tables in the terminal, a page with a timeline.

page.py      `profile.html`; needs no other file
findings.py  what a profile says, as sentences and headline numbers
tables.py    its tables, for terminal and page
plots.py     its plots
timeline.py  the data of the timeline: for each step, the lanes of each rank and their items
"""
