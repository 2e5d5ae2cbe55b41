"""The output of `moepp profile`: tables in the terminal, a page.

page.py      `profile.html`; needs no other file
findings.py  what a profile says, as sentences and headline numbers
tables.py    its tables, for terminal and page
plots.py     its plots
"""
