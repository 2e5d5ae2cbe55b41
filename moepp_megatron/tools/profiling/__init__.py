"""Where the communication time of a run goes.

trace.py             what one rank recorded, and what its process groups are for
formats/             traces of torch's profiler
measures/            exposure, waiting, bytes, experts' load, links
analysis.py          what all ranks recorded, on one clock, and all of it together
document.py          the same as JSON
"""
