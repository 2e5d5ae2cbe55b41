"""Where the communication time of a run goes, and how its speed scales.

collective.py    one collective operation, whatever recorded it
ceiling.py       bandwidth that `moepp bench collectives` has measured
scaling/         scaling tests: points, jobs, efficiency
"""
