"""Samples a run will read."""

from moepp_megatron.config import Config


def planned_samples(config: Config) -> int:
    """Sequences that `training.train_iters` steps read, a ramp of the batch included."""
    training = config.training
    if training.batch_ramp is None:
        return training.train_iters * training.global_batch_size
    # Seconds of imports: megatron-core computes the ramp.
    from moepp_megatron.training.schedule import BatchSizes

    return BatchSizes(config).planned_samples()
