"""Experiments: sets of runs that can be interrupted and go on, and what follows from them.

runs.py           a set of runs in one folder: claim it, do what is missing, stop on request
training_runs.py  a set whose runs are each a `moepp train`
pilot/            does MoE++ pay on the user's data? Paired training runs of MoE++ and vanilla
scaling/          step time and efficiency of MoE++ and vanilla over rank counts
"""
