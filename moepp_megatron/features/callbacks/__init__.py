"""A user's objects that get the events of a run (`run.callbacks`).

settings.py  `run.callbacks`
part.py      their protocol, and the part that calls them
"""
