"""Records chosen steps with torch's profiler, for `moepp profile`.

recorder.py          which steps, the files
collective_names.py  process group and number of every collective, as a range in the trace
description.py       the file beside each trace: groups, layout, routing, clock
"""

from moepp_megatron.training.profiler.recorder import StepRecorder

__all__ = ["StepRecorder"]
