"""The pilot: does MoE++ pay on the user's own data, and how sure is that?

In the order in which they work:

arms.py        the models that are compared (the arms), each as a configuration
trials.py      an arm with a seed, as a training run; sessions that time MoE++ and vanilla in turn
plan.py        what is fixed before anything is decided: plan.json
procedure.py   all trials in their order
outcome.py     what a run's records show, and an arm's means over seeds
statistics.py  Student's t, estimates with their uncertainty, losses of all arms in one model
verdict.py     does MoE++ pay, and how sure must a decision be?
collect.py     all of it, from finished runs to the result
result.py      the result: the contents of pilot.json
page.py        pilot.html, and the same in the terminal
"""
