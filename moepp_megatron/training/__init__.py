"""The training run: optimizer, schedule, loop, statistics, checkpoints."""
