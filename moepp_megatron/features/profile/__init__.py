"""Records chosen steps with torch's profiler (`training.profile_steps`), for `moepp profile`.

settings.py         steps and ranks that are recorded
part.py              the part of a run
recorder.py          records steps, writes files
collective_names.py  process group and number of every collective, as a range in the trace
ranges.py            names for the parts of a model in profiler traces: `moepp/layer3/dispatch`
traffic.py           counts the bytes that each layer's routing must send
"""
