"""The MoE++ layer for megatron-core: router, zero-computation experts, dispatcher, lane, spec.

adapter.py            exchanges modules in the spec of a layer
balance.py            the heterogeneous balance loss and how it joins the language-model loss
budget.py             how many FFN experts a token gets
capacity.py           heterogeneous expert capacities
config.py             what a MoE++ layer is
copies.py             copies of rows for the columns of a map, and their sums on the way back
cpu_experts.py        FFN experts on a CPU
cuda_graphs.py        attention and router of a layer as CUDA graphs; the rest is launched normally
dedup_dispatcher.py   an all-to-all that sends a token at most once to each rank
dispatcher.py         token dispatchers that move only what FFN experts need
exchange.py           an all-to-all that leaves time for work, forward and backward
expert_groups.py      group-limited routing: FFN experts come from a token's best groups of them
flex_dispatcher.py    megatron-core's flex dispatcher (DeepEP) without what no FFN expert takes
gate_product.py       the fp32 product of hidden states with gate and mixing weights
grouped_experts.py    FFN experts on a GPU without Transformer Engine
replay.py             routes that routers repeat: given to them, recorded from them, checked
router_health.py      how healthy a router is: what one step's logits, gates and gradients say
lane.py               the lane on which router logits travel from MoE layer to MoE layer
layer.py              the MoE++ layer: dispatch, FFN experts, combine, zero-computation experts
margins.py            how far selections are from other numbers of FFN experts
multi_token.py        layers of multi-token prediction with MoE++
overlap.py            a MoE++ layer as nodes of megatron-core's combined schedule
padding.py            padding masks: which tokens a router does not route
parameter.py          parameters that every rank of a tensor-parallel group holds whole
reference.py          the MoE++ layer in plain PyTorch on one process
router.py             the router: gating residuals, selection over all experts, gates, balance loss
router_config.py      the router's configuration: megatron-core's, with the count of all experts
selection.py          which experts a token's logits select, and with which gates
scores.py             from router logits to scores: the list of score functions
spec.py               builds MoE++ layers from megatron-core's own specs
statistics.py         what one MoE layer did since the last reset
token_tags.py         tags: what MoE++ layers count a token as
upstream_private.py   the names with an underscore that this package takes from megatron-core
upstream_settings.py  how the MoE++ layer treats each of megatron-core's settings of a MoE layer
upstream_versions.py  the versions of megatron-core, and all that differs between them
watch.py              counts and measures what a router does
zero_computation.py   zero, copy and constant experts

Nothing here knows about training, files or the command line, so any Megatron loop can use it.

In all files `logits` and `gates` are [T, E] fp32 of T local tokens (in [sequence position,
sequence] order) and E experts, gates 0 where not selected; `routing_map` is [T, E] bool; `padded`
[T] bool tokens that are padding, and do not count, or None; `bias` the [E] fp32 selection bias, or
None; `tags` are the [s, b] int64 of `token_tags`, or None.
"""
