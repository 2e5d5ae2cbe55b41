"""Detects changes in the series of a run: loss, routing, logits, token ids.

detector.py  judges one series; a row of settings for each kind
monitor.py   all series of a run together: what has changed, since when, and why
"""
