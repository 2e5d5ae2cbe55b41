"""The cells of the layout matrix.

`PAIRS` holds every pair of option values that can meet on up to 8 ranks (a test says which cannot),
found by a greedy search over random layouts. `CORNERS` are routings that training rarely reaches.
`FAST` holds every option value once, in few ranks: it runs with every change.
"""

from tests.parallel.layouts import Cell

# fmt: off
PAIRS = [
    Cell(ranks=2, cp=2, optimizer="overlap reduce", recompute="moe", gates="selected", scope="sequence", router="no residual", extras="gqa"),
    Cell(ranks=4, pp=2, stages="ends apart", optimizer="whole", recompute="uniform", scope="sequence", layers="mixed", capacity=True),
    Cell(ranks=4, tp=2, pp=2, stages="interleaved", optimizer="whole", recompute="moe", gates="selected", scope="sequence", router="two layers", dtype="bf16", extras="gqa"),
    Cell(ranks=8, etp=2, micro_batches=1, recompute="moe", dispatcher="allgather", gates="nonzero", layers="mixed", router="two layers", capacity=True, dtype="bf16", extras="z loss"),
    Cell(ranks=8, ep=2, etp=2, optimizer="whole", micro_batches=1, recompute="moe", dispatcher="allgather", gates="nonzero", scope="global", dtype="bf16", extras="tied"),
    Cell(ranks=8, ep=4, etp=2, optimizer="overlap reduce", micro_batches=1, recompute="block", dispatcher="allgather", gates="nonzero", scope="global", layers="mixed", dtype="bf16", extras="tied"),
    Cell(ranks=8, ep=8, optimizer="overlap both", micro_batches=1, recompute="block", dispatcher="allgather", router="no residual", extras="shared"),
    Cell(ranks=8, ep=8, optimizer="overlap both", micro_batches=1, recompute="uniform", gates="selected", layers="mixed", capacity=True, extras="gqa"),
    Cell(ranks=8, ep=8, optimizer="overlap reduce", micro_batches=1, dispatcher="allgather", scope="sequence", layers="mixed", router="vanilla", dtype="bf16"),
    Cell(ranks=8, ep=8, cp=2, recompute="uniform", dispatcher="allgather", gates="selected", router="no residual", capacity=True, extras="tied"),
    Cell(ranks=8, pp=2, stages="ends apart", ep=2, etp=2, cp=2, optimizer="overlap both", micro_batches=4, dispatcher="allgather", gates="nonzero", scope="global", layers="mixed", router="two layers", extras="gqa"),
    Cell(ranks=8, pp=2, stages="ends apart", ep=4, micro_batches=1, recompute="moe", dispatcher="allgather", gates="selected", scope="global", layers="mixed", router="no residual", dtype="bf16"),
    Cell(ranks=8, pp=2, stages="interleaved", ep=2, etp=2, optimizer="overlap reduce", layers="mixed", router="vanilla", extras="z loss"),
    Cell(ranks=8, pp=2, stages="uneven interleaved", recompute="block", dispatcher="allgather", gates="selected", layers="mixed", dtype="bf16", extras="z loss"),
    Cell(ranks=8, pp=2, stages="uneven interleaved", ep=4, optimizer="overlap both", dispatcher="allgather", scope="sequence", layers="mixed", router="no residual", capacity=True, dtype="bf16", extras="tied"),
    Cell(ranks=8, pp=2, stages="uneven", etp=2, optimizer="overlap reduce", micro_batches=1, recompute="block", gates="nonzero", scope="sequence", layers="mixed", router="two layers", extras="shared"),
    Cell(ranks=8, pp=2, stages="uneven", ep=4, optimizer="whole", micro_batches=1, recompute="uniform", scope="sequence", dtype="bf16", extras="z loss"),
    Cell(ranks=8, pp=4, stages="ends apart", optimizer="overlap reduce", micro_batches=4, recompute="uniform", dispatcher="allgather", gates="selected", scope="global", dtype="bf16", extras="shared"),
    Cell(ranks=8, pp=4, stages="ends apart", ep=2, cp=2, micro_batches=1, recompute="block", gates="nonzero", scope="sequence", router="no residual", capacity=True, extras="z loss"),
    Cell(ranks=8, pp=4, optimizer="overlap both", micro_batches=1, recompute="moe", dispatcher="allgather", gates="nonzero", scope="sequence", capacity=True, extras="gqa"),
    Cell(ranks=8, pp=4, stages="interleaved", ep=2, optimizer="whole", micro_batches=4, recompute="block", dispatcher="allgather", gates="selected", scope="global", router="no residual"),
    Cell(ranks=8, pp=4, stages="uneven interleaved", ep=2, optimizer="overlap both", micro_batches=4, recompute="moe", dispatcher="allgather", gates="selected", router="two layers", capacity=True, dtype="bf16"),
    Cell(ranks=8, pp=4, stages="uneven", etp=2, optimizer="whole", recompute="moe", dispatcher="allgather", layers="mixed", router="no residual", extras="tied"),
    Cell(ranks=8, pp=4, stages="uneven", etp=2, cp=2, micro_batches=4, layers="mixed", router="vanilla", extras="gqa"),
    Cell(ranks=8, tp=2, ep=4, etp=2, optimizer="whole", recompute="block", gates="nonzero", scope="global", router="two layers", dtype="bf16", extras="gqa"),
    Cell(ranks=8, tp=2, ep=4, etp=2, cp=2, optimizer="overlap reduce", micro_batches=1, recompute="moe", gates="selected", scope="sequence", router="no residual", capacity=True, extras="shared"),
    Cell(ranks=8, tp=2, ep=8, optimizer="whole", micro_batches=1, recompute="block", dispatcher="allgather", gates="nonzero", layers="mixed", extras="gqa"),
    Cell(ranks=8, tp=2, ep=8, cp=2, micro_batches=4, recompute="moe", gates="nonzero", scope="global", router="two layers", extras="z loss"),
    Cell(ranks=8, tp=2, pp=2, stages="ends apart", ep=4, cp=2, optimizer="overlap reduce", recompute="block", layers="mixed", router="vanilla", extras="tied"),
    Cell(ranks=8, tp=2, pp=2, ep=4, cp=2, optimizer="overlap both", micro_batches=1, dispatcher="allgather", gates="selected", scope="sequence", layers="mixed", capacity=True, extras="z loss"),
    Cell(ranks=8, tp=2, pp=2, stages="interleaved", etp=2, cp=2, optimizer="overlap both", recompute="uniform", gates="nonzero", capacity=True),
    Cell(ranks=8, tp=2, pp=2, stages="interleaved", ep=4, gates="selected", scope="sequence", layers="mixed", extras="tied"),
    Cell(ranks=8, tp=2, pp=2, stages="interleaved", ep=4, cp=2, micro_batches=4, recompute="moe", dispatcher="allgather", scope="sequence", layers="mixed", router="vanilla", dtype="bf16", extras="shared"),
    Cell(ranks=8, tp=2, pp=2, stages="uneven interleaved", etp=2, optimizer="overlap reduce", micro_batches=4, recompute="uniform", dispatcher="allgather", gates="nonzero", scope="global", dtype="bf16", extras="gqa"),
    Cell(ranks=8, tp=2, pp=2, stages="uneven interleaved", ep=2, etp=2, cp=2, optimizer="whole", gates="selected", router="vanilla", extras="shared"),
    Cell(ranks=8, tp=2, pp=2, stages="uneven", ep=2, etp=2, optimizer="overlap both", micro_batches=4, recompute="uniform", dispatcher="allgather", gates="selected", layers="mixed", router="vanilla"),
    Cell(ranks=8, tp=2, pp=4, stages="uneven", ep=2, optimizer="whole", micro_batches=4, recompute="uniform", scope="global", router="two layers", capacity=True, dtype="bf16", extras="tied"),
]
# fmt: on

NONE, ONE = "no FFN token", "one FFN expert"
HALF, HALF_SEQUENCE = "half of the FFN experts", "no FFN token in half of the sequence"
CORNERS = [
    Cell(ranks=2, ep=2, routing=NONE, optimizer="overlap both", recompute="moe"),
    Cell(ranks=4, tp=2, ep=2, etp=2, routing=NONE, gates="nonzero"),
    Cell(ranks=4, pp=2, stages="interleaved", ep=2, routing=NONE, dispatcher="allgather"),
    Cell(ranks=4, ep=4, routing=ONE, capacity=True),
    Cell(ranks=8, tp=2, pp=2, ep=4, routing=ONE, recompute="uniform"),
    Cell(ranks=4, ep=4, routing=HALF, optimizer="overlap reduce"),
    Cell(ranks=2, ep=2, routing=HALF, dispatcher="allgather"),
    Cell(ranks=2, tp=2, ep=2, routing=HALF_SEQUENCE),
    Cell(ranks=4, cp=2, ep=4, routing=HALF_SEQUENCE, dispatcher="allgather"),
    Cell(ranks=8, ep=8, seq_length=1, micro_batches=1),
    Cell(ranks=8, tp=2, cp=2, ep=4, etp=2, seq_length=8, micro_batches=4),
    Cell(ranks=2, tp=2, ep=2, seq_length=2, micro_batches=8, capacity=True, gates="nonzero"),
]

FAST = [
    Cell(ranks=2, optimizer="whole"),
    Cell(ranks=2, optimizer="overlap both", recompute="uniform", dtype="bf16"),
    Cell(ranks=2, ep=2, dispatcher="allgather", gates="nonzero", capacity=True),
    Cell(ranks=2, pp=2, stages="interleaved", recompute="moe", scope="sequence"),
    Cell(ranks=2, pp=2, stages="uneven", layers="mixed", router="two layers", dtype="bf16"),
    Cell(ranks=4, pp=4, stages="ends apart", micro_batches=4, extras="tied", recompute="block"),
    Cell(ranks=4, pp=2, ep=2, stages="uneven interleaved", router="no residual", extras="shared"),
    Cell(ranks=4, tp=2, ep=2, etp=2, gates="selected", optimizer="overlap reduce", extras="gqa"),
    Cell(ranks=4, cp=2, ep=4, capacity=True, extras="z loss"),
    Cell(ranks=4, tp=2, cp=2, ep=2, scope="global", gates="nonzero", capacity=True),
    Cell(ranks=4, tp=2, pp=2, ep=2, router="vanilla"),
    Cell(ranks=8, ep=8, micro_batches=1, scope="global"),
    Cell(ranks=2, ep=2, routing=NONE),
]
