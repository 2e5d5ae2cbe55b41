"""Records chosen steps with torch's profiler, so that `moepp profile` can say where time went.

recorder.py          which steps, the files
collective_names.py  process group and number of every collective, as a range in the trace
description.py       the file beside each trace: groups, layout, routing, clock
"""

from moepp_megatron.training.profiler.recorder import StepRecorder

__all__ = ["StepRecorder"]
