"""Experiments: arms x seeds, each pair a trial that is measured once, and what follows from them.

runner.py      does the trials of a folder that have no result; stops on request
timed_step.py  the trial that both have: MoE++ and vanilla timed in turn by `moepp bench step`
statistics.py  Student's t, estimates with their uncertainty, losses of all arms in one model
pilot/         does MoE++ pay on the user's data? Runs of MoE++ and vanilla with the same seeds
scaling/       step time and efficiency of MoE++ and vanilla over rank counts
"""
