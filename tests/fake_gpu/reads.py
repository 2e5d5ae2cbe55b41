"""Every place where a training step makes the host wait for the device, and how often.

The test takes this table for what a step of the smallest model may do; a read that is not in it
fails. Places are file and function: `kind file:function`. Numbers are reads for each:

- STEP: a step, whatever its micro-batches
- LAYER: a MoE layer and micro-batch (twice as many with full recomputation)

docs/gpu.md says what each is for.
"""

_CORE, _OWN = "megatron/core", "moepp_megatron"
_DISPATCHER = f"{_CORE}/transformer/moe/token_dispatcher.py"

# Every step: loss, gradient norm, whether both are sound on all ranks, the stop flag, and what the
# alerts need of losses and routers.
STEP = {f"copy to the host {_OWN}/training/step_sums.py:read_step": 1}
# How many rows each rank and expert gets, which sizes of tensors depend on.
ALL_TO_ALL = {f"synchronize {_DISPATCHER}:_maybe_dtoh_and_synchronize": 1}
DEDUPLICATED = {f"copy to the host {_OWN}/moe/dedup_dispatcher.py:exchange_counts": 1}
ALL_GATHER = {f"copy to the host {_DISPATCHER}:dispatch_postprocess": 1}
# They wait for their counts themselves.
DEEPEP = {f"DeepEP {_DISPATCHER}:dispatch": 1}
HYBRIDEP = {f"HybridEP {_DISPATCHER}:dispatch": 1}
# With tokens that are no multiple of 64: the most tokens of all ranks.
UNEVEN = {f"{kind} {_DISPATCHER}:setup_metadata": 1 for kind in ("copy to the device", "item")}
# It looks for the rows and their gates once more; before Transformer Engine's permutation this
# package asks whether there are any.
PERMUTATION = {f"masked_select {_DISPATCHER}:dispatch_postprocess": 1}
FUSED_PERMUTATION = {f"item {_OWN}/moe/dispatcher.py:dispatch_postprocess": 1}


def of_overrides(overrides):
    """Tables of a layer with Transformer Engine, by the dispatcher that overrides name."""
    settings = dict(each.split("=", 1) for each in overrides)
    if "moe.static_rows" in settings:
        return ()
    tables = {
        "alltoall": (ALL_TO_ALL,),
        "alltoall_dedup": (DEDUPLICATED,),
        "allgather": (ALL_GATHER, PERMUTATION, FUSED_PERMUTATION),
        "deepep": (DEEPEP,),
        "hybridep": (HYBRIDEP,),
    }
    dispatcher = settings.get("moe.dispatcher", "alltoall")
    if dispatcher == "flex":
        dispatcher = settings.get("moe.flex_backend", "deepep")
    return tables[dispatcher]
