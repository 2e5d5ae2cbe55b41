"""The features of a run, one file each: parts by the protocol of `training.part`.

budget.py            applies the budget of FFN experts per token to the model, step by step
callbacks.py         a user's objects that get the events of a run: the protocol's public half
data_stages.py       which of its data a run is drawing from, and when others follow
distillation.py      a teacher's forward pass, and the loss that compares both models
mtp.py               the loss of multi-token prediction (MTP) of a step
order.py             the list of parts, in the order in which they are called
profile.py           profiles of single steps
refused_batches.py   the numerical guard: refuses batches and acts on their cause
router_health.py     the router health of a step, from every rank's sums
routes.py            records, repeats and traces the experts that tokens take
routing_counts.py    selections, losses and bytes of one step, over all ranks
routing_guard.py     the routing guard: judges every step's routers
shift.py             shifts of the data, judged in every step
sources.py           loss, FFN share and use of the experts by data source
tasks.py             evaluates the running model on tasks of lm-eval
telemetry.py         telemetry of all nodes
token_groups.py      FFN experts of each class of tokens
validation.py        validation losses
"""
