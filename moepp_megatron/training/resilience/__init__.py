"""Watches over a run: bad batches, silent divergence, hangs, stragglers.

hang_report.py        heartbeats, torch's flight recorder; finds the rank that blocks the others
numerical_guard.py    decides, on all ranks alike, whether a batch may change the model
stragglers.py         time in collectives; the rank that is slower than the others
supervisor.py         all monitors as one object; finds ranks whose copies of parameters differ
watchdog.py           the training thread's phase, and a thread that ends a run without progress
"""
