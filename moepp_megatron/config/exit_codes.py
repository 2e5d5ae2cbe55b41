"""Exit statuses of `moepp` commands and of ranks."""

FAILED = 1
"""A command, or a run, has failed."""
REFUSED = 2
"""A user's error in configuration or usage, said in one line (`ConfigError`)."""
UNFIT = 3
"""This machine cannot do it (`UnfitError`)."""
HUNG = 70
"""A rank of a run in which nothing moved any more."""
LOST = 71
"""A machine whose wait for the other machines has failed."""
STOPPED = 75
"""A run that was asked to stop and has saved; its last line resumes it."""
SIGNALLED = 128
"""Plus its number, where a signal has ended a process."""
