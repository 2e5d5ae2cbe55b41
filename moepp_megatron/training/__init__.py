"""The training run: optimizer, schedule, loop, statistics, checkpoints.

alerts.py              the records and alerts of a run: refused batches, stages, failed saves
batches.py             micro-batches on this rank's device, for training and validation
inference_settings.py  turns a training configuration into one for forward passes only
optimizers.py          the optimizer: its kind, and the groups of parameters that differ
part.py                the protocol of a part; features/ and parts/ have them
rng.py                 random states of a rank
run.py                 a whole run: `moepp train` as a function
schedule.py            the learning rate and the batch size of every step
setup.py               wraps the model: precision, data parallelism, optimizer, schedule
signals.py             stopping on request: finish the step, save, leave
step.py                one training step
step_sums.py           a step's reductions: summed over all ranks and read once
token_scores.py        log-probabilities of given tokens from a built model
train_request.py       a request of `moepp train`, checked before anything heavy is imported
trainer.py             the run from start to end
"""
