"""The pilot: does MoE++ pay on the user's own data, and how sure is that?

In the order in which they work:

arms.py        the models that are compared (the arms), each as a configuration
runs.py        an arm with a seed, as a training run
plan.py        what is fixed before anything is decided: plan.json
sessions.py    MoE++ and vanilla timed in turn, in processes of their own
procedure.py   all runs in their order
outcome.py     what a run's records show, and an arm's means over seeds
statistics.py  Student's t, estimates with their uncertainty
pooled.py      losses of all arms in one model, so that every run informs the noise
schedule.py    looks, and how sure a decision must be at each
evidence.py    differences of losses, and what they are worth
verdict.py     does MoE++ pay?
collect.py     all of it, from finished runs to the result
result.py      the result: the contents of pilot.json
page.py        pilot.html
terminal.py    the same in the terminal
"""
