"""Watches over a run: bad batches, silent divergence, hangs, stragglers.

divergence.py         finds ranks whose copies of the same parameters differ
flight_recorder.py    torch's flight recorder: which collectives a rank has begun and not completed
hang_report.py        heartbeats in files; finds the rank that blocks the others
numerical_guard.py    decides, on all ranks alike, whether a batch may change the model
refused_batches.py    finds the cause of batches refused in a row: the model, numbers, or data
stragglers.py         time in collectives; the rank that is slower than the others
supervisor.py         everything that watches over a run, as one object for the training loop
watchdog.py           the training thread's phase, and a thread that ends a run without progress
"""
