"""The output of `moepp profile`: a table in the terminal, a page with a timeline.

page.py      `profile.html`: findings, a timeline of each step, tables; needs no other file
plots.py     plots of a profile's page
rows.py      rows of the tables in terminal and page
terminal.py  prints a profile in the terminal
timeline.py  the data of the page's timeline: for each step, the lanes of each rank and their items
findings.py  describes the findings of a profile in words, the most expensive first
"""
