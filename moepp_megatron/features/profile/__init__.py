"""Records chosen steps with torch's profiler (`training.profile_steps`), for `moepp profile`.

settings.py  steps and ranks that are recorded
part.py      records steps, writes files
ranges.py    names for parts of a model and collectives in profiler traces
"""
