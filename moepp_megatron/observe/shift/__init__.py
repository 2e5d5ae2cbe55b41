"""Detects shifts of the data in the series of a run: routing, loss, token ids, data sources.

noise.py     how much usual steps differ from their forecasts
detector.py  judges one series; a row of settings for each kind of series
losses.py    the series of a loss, and those of the data sources
routing.py   the series of the use of the experts together with the loss
tokens.py    the series of the token ids
reading.py   the result after a step, and what it is about
monitor.py   all series of a run
"""
