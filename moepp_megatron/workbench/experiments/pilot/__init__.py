"""The pilot: does MoE++ pay on the user's own data, and how sure is that?

In the order in which they work:

arms.py         the models that are compared (the arms), each as a configuration
runs.py         every arm with every seed, as a set of training runs
outcome.py      what a run's records show, and an arm's means over seeds
statistics.py   means with 95% intervals, and how many seeds would decide
equal_speed.py  a MoE++ arm against a vanilla model that is as fast
extrapolate.py  the arms at the size of the target, by the cost model
verdict.py      loss and speed brought together: does an arm pay?
sentences.py    the verdict and its reasons in English
collect.py      all of it, from finished runs to the result
result.py       the result: what pilot.json holds
report/         the page and the tables in the terminal
"""
