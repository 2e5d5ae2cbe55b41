"""The pilot: does MoE++ pay on the user's own data, and how sure is that?

arms.py        the models that are compared (the arms), their training runs, the timing sessions
statistics.py  Student's t, estimates with their uncertainty, losses of all arms in one model
verdict.py     does MoE++ pay, and how sure must a decision be?
pilot.py       all trials in their order, from plan.json to the result
page.py        pilot.html, and the same in the terminal
"""
