"""Where the communication time of a run goes.

collective.py        one collective operation, whatever recorded it
groups.py            what a process group is for
trace.py             what one rank recorded
load.py              what all ranks recorded, on one clock
formats/             torch's profiler, NCCL's profilers, the flight recorder
measures/            exposure, waiting, bytes, experts' load, links
analysis.py          all of it together
recognise.py         what a path holds; the summary of any recording
document.py          the same as JSON
merge.py             ranks brought onto one clock
summary.py           a profile in a few numbers, to compare
step_summary.py      the summary of an analysed profile
changes.py           differences between two profiles, with sizes and causes
compare.py           these differences in words
"""
