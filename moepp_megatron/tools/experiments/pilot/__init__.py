"""The pilot: does MoE++ pay on the user's own data, and how sure is that?

arms.py     the models that are compared (the arms), their training runs, the timing sessions
verdict.py  does MoE++ pay, and how sure must a decision be?
pilot.py    all trials in their order, and the result
page.py     pilot.html, and the same in the terminal
"""
