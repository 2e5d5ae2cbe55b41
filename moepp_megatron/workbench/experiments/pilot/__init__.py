"""The pilot: does MoE++ pay on the user's own data, and how sure is that?

In the order in which they work:

arms.py         the models that are compared (the arms), each as a configuration
runs.py         an arm with a seed, as a training run
plan.py         what is fixed before anything is decided: plan.json
sessions.py     MoE++ timed beside vanilla, in processes of their own
procedure.py    all runs in their order
outcome.py      what a run's records show, and an arm's means over seeds
statistics.py   Student's t, estimates with their uncertainty
pooled.py       losses of all arms in one model, so that every run tells of the noise
schedule.py     looks, and how sure a decision must be at each
evidence.py     differences of losses of one MoE++ arm, and what they are worth
extrapolate.py  the arms at the size of the target, by the cost model
verdict.py      does an arm pay?
sentences.py    the verdict and its reasons in English
collect.py      all of it, from finished runs to the result
result.py       the result: what pilot.json holds
report/         the page and the tables in the terminal
"""
