"""Watches over a run: bad batches, silent divergence, hangs, stragglers.

activity.py           this rank's current phase, for the watchdog's thread
collective_clock.py   time that the training thread waits for other ranks
divergence.py         finds ranks whose copies of the same parameters differ
flight_recorder.py    torch's flight recorder: which collectives a rank has begun and not completed
hang_report.py        finds the rank that blocks the others, from the heartbeats of all ranks
heartbeat.py          one small file a rank, which others read when nothing moves
numerical_guard.py    decides, on all ranks alike, whether a batch may change the model
refused_batches.py    finds the cause of batches refused in a row: the model, numbers, or data
stragglers.py         straggler detection: the rank that is slower than the others
supervisor.py         everything that watches over a run, as one object for the training loop
watchdog.py           a thread that ends a run which no longer makes progress
"""
