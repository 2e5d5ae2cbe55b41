"""Static rows: FFN experts have a fixed number of rows, and a step that overflows runs again.

settings.py  `moe.static_rows`
part.py      repeats a step that overflows
"""
