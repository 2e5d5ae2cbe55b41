"""Every place where a training step makes the host wait for the device, and how often.

The test takes this table for what a step of the smallest model may do; a read that is not in it
fails. Places are file and function: `kind file:function`. Numbers are reads for each:

- STEP: a step, whatever its micro-batches
- LAYER: a MoE layer and micro-batch (twice as many with full recomputation)

docs/gpu.md says what each is for.
"""

from __future__ import annotations

_CORE, _OWN = "megatron/core", "moepp_megatron"
_DISPATCHER = f"{_CORE}/transformer/moe/token_dispatcher.py"

# Every step: the loss for the guard and the log, the gradient norm of each optimizer (one for
# experts that are spread over ranks).
STEP = {
    f"copy to the host {_OWN}/training/step.py:run_schedule": 1,
    f"item {_CORE}/optimizer/clip_grads.py:get_grad_norm_fp32": 2,
}
# The alerts, which every run has by default: the loss over sequences and what the routers selected.
WATCHED = {
    f"copy to the device {_OWN}/training/batch_losses.py:end": 1,
    f"tolist {_OWN}/training/batch_losses.py:end": 1,
    f"copy to the host {_OWN}/training/collect.py:sum_over_ranks": 1,
}
# With the numerical guard and the stop flag, which every run has: two numbers of all ranks each.
GUARD = {
    f"copy to the device {_OWN}/training/resilience/numerical_guard.py:global_loss": 1,
    f"tolist {_OWN}/training/resilience/numerical_guard.py:global_loss": 1,
    f"copy to the device {_OWN}/training/signals.py:agreed": 1,
    f"item {_OWN}/training/signals.py:agreed": 1,
}
# How many rows each rank and expert gets, which sizes of tensors depend on.
ALL_TO_ALL = {f"synchronize {_DISPATCHER}:_maybe_dtoh_and_synchronize": 1}
DEDUPLICATED = {f"copy to the host {_OWN}/moe/dedup_dispatcher.py:_exchange_counts": 1}
ALL_GATHER = {f"copy to the host {_DISPATCHER}:dispatch_postprocess": 1}
# It looks for the rows and their gates once more; before Transformer Engine's permutation this
# package asks whether there are any.
PERMUTATION = {f"masked_select {_DISPATCHER}:dispatch_postprocess": 1}
FUSED_PERMUTATION = {f"item {_OWN}/moe/dispatcher.py:dispatch_postprocess": 1}
