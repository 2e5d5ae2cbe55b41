"""The MoE++ layer for megatron-core: router, zero-computation experts, dispatcher, lane, spec.

balance.py            the heterogeneous balance loss and how it joins the language-model loss
budget.py             controllers that hold the FFN experts per token at a target
capacity.py           heterogeneous expert capacities
config.py             settings of a MoE++ layer
copies.py             permutation: copies of rows per selection, and their sums on the way back
cuda_graphs.py        attention, router and experts of a layer as CUDA graphs
dedup_dispatcher.py   an all-to-all that sends a token at most once to each rank
static_dispatcher.py  an all-to-all of equal splits, whose sizes the host knows before
dispatcher.py         token dispatchers that move only what FFN experts need
exchange.py           an all-to-all that leaves time for work, forward and backward
flex_dispatcher.py    megatron-core's flex dispatcher (DeepEP), for FFN-routed tokens only
gate_product.py       the fp32 product of hidden states with gate and mixing weights
local_experts.py      FFN experts on a CPU, and on a GPU, where their sizes stay on the device
replay.py             routing replay: record, check and repeat the routers' selections
router_health.py      router health metrics from one step's logits, gates and gradients
lane.py               the lane on which router logits travel from MoE layer to MoE layer
layer.py              the MoE++ layer: dispatch, FFN experts, combine, zero-computation experts
margins.py            distance of each selection from more or fewer FFN experts
multi_token.py        layers of multi-token prediction with MoE++
overlap.py            a MoE++ layer as nodes of megatron-core's combined schedule
padding.py            padding masks: tokens that a router does not route
parameter.py          parameters that every rank of a tensor-parallel group holds whole
reference.py          the MoE++ layer in plain PyTorch on one process
router.py             the router: gating residuals, selection over all experts, gates, balance loss
selection.py          top-K selection of experts from logits, groups of them, and their gates
scores.py             from router logits to scores: the list of score functions
spec.py               builds MoE++ layers from megatron-core's own specs
stack.py              the layers of a pipeline stage, between which the lane is handed on
statistics.py         counts and measures what the router of one MoE layer does
token_tags.py         token tags, by which MoE++ layers group their counts
upstream_private.py   the names with an underscore that this package takes from megatron-core
upstream_settings.py  how the MoE++ layer treats each of megatron-core's settings of a MoE layer
upstream_versions.py  the versions of megatron-core, and all that differs between them
zero_computation.py   zero, copy and constant experts

Nothing here knows about training, files or the command line, so any Megatron loop can use it.

In all files `logits` and `gates` are [T, E] fp32 of T local tokens (in [sequence position,
sequence] order) and E experts, gates 0 where not selected; `routing_map` is [T, E] bool; `padded`
[T] bool tokens that are padding, and do not count, or None; `bias` the [E] fp32 selection bias, or
None; `tags` are the [s, b] int64 of `token_tags`, or None.
"""
