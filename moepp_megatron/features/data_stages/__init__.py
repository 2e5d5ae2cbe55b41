"""Training data in stages (`data.stages`).

settings.py  `data.stages`
part.py      the current stage of the data, and when the next begins
"""
