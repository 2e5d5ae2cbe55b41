"""A cell of the layout matrix: a layout with the settings that it trains.

A cell names what differs from the plainest run; `run_settings` is the whole configuration and
`reference_settings` that of the one process which it must equal.
"""

from dataclasses import dataclass, fields

from tests.parallel import forced_routing
from tests.parallel.training_runs import FULL, SELECTIVE, VANILLA, settings

GLOBAL_BATCH = 8

# By pipeline ranks. "even" and "interleaved" leave the division to megatron-core, the others are
# layout strings: E embedding, t layer, L loss.
STAGES = {
    ("uneven", 2): "Et|tttL",
    ("uneven", 4): "Ett|t|t|L",
    ("ends apart", 2): "Etttt|L",
    ("ends apart", 4): "E|tt|tt|L",
    ("uneven interleaved", 2): "E|tt|t|tL",
    ("uneven interleaved", 4): "E|tt|t|t|t|tt|t|L",
}
RECOMPUTE = {
    "none": {},
    "uniform": FULL,
    "block": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 1,
    },
    "moe": SELECTIVE,
}
OPTIMIZER = {
    "whole": {"use_distributed_optimizer": False},
    "distributed": {},
    "overlap reduce": {"overlap_grad_reduce": True},
    "overlap both": {"overlap_grad_reduce": True, "overlap_param_gather": True},
}
# A word of a cell and the field and value that it stands for; what no word names is the default.
WORDS = {
    "interleaved": ("stages", "interleaved"),
    "uneven": ("stages", "uneven"),
    "ends-apart": ("stages", "ends apart"),
    "uneven-interleaved": ("stages", "uneven interleaved"),
    "whole": ("optimizer", "whole"),
    "reduce": ("optimizer", "overlap reduce"),
    "gather": ("optimizer", "overlap both"),
    "re-uniform": ("recompute", "uniform"),
    "re-block": ("recompute", "block"),
    "re-moe": ("recompute", "moe"),
    "allgather": ("dispatcher", "allgather"),
    "dedup": ("dispatcher", "alltoall_dedup"),
    "selected": ("gates", "selected"),
    "nonzero": ("gates", "nonzero"),
    "sequence": ("scope", "sequence"),
    "global": ("scope", "global"),
    "mixed": ("layers", "mixed"),
    "no-residual": ("router", "no residual"),
    "two-layers": ("router", "two layers"),
    "vanilla": ("router", "vanilla"),
    "capacity": ("capacity", True),
    "bf16": ("dtype", "bf16"),
    "gqa": ("extras", "gqa"),
    "tied": ("extras", "tied"),
    "z-loss": ("extras", "z loss"),
    "shared": ("extras", "shared"),
    "no-ffn-token": ("routing", "no FFN token"),
    "one-ffn-expert": ("routing", "one FFN expert"),
    "half-of-ffn-experts": ("routing", "half of the FFN experts"),
    "half-sequence-without-ffn": ("routing", "no FFN token in half of the sequence"),
}
# Words that end in a number, such as tp2.
NUMBERS = {
    "tp": "tp",
    "pp": "pp",
    "ep": "ep",
    "etp": "etp",
    "cp": "cp",
    "mb": "micro_batches",
    "seq": "seq_length",
}
ROUTINGS = {
    "": None,
    "no FFN token": forced_routing.only_zero_experts,
    "one FFN expert": forced_routing.one_ffn_expert,
    "half of the FFN experts": forced_routing.first_half_of_ffn_experts,
    "no FFN token in half of the sequence": forced_routing.second_half_without_ffn,
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A layout and its settings."""

    ranks: int
    tp: int = 1
    pp: int = 1
    stages: str = "even"
    ep: int = 1
    etp: int = 1
    cp: int = 1
    optimizer: str = "distributed"
    micro_batches: int = 2
    recompute: str = "none"
    dispatcher: str = "alltoall"
    gates: str = "none"
    scope: str = "microbatch"
    layers: str = "moe"
    router: str = "residual"
    capacity: bool = False
    dtype: str = "fp32"
    extras: str = ""
    routing: str = ""
    seq_length: int = 16

    def __str__(self):
        """The line that `parse_cells` reads."""
        names = {entry: word for word, entry in WORDS.items()}
        prefixes = {name: prefix for prefix, name in NUMBERS.items()}
        words = [str(self.ranks)]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default and field.name in prefixes:
                words.append(f"{prefixes[field.name]}{value}")
            elif value != field.default:
                words.append(names[field.name, value])
        return " ".join(words)

    @property
    def dp(self):
        """Data-parallel ranks."""
        return self.ranks // (self.tp * self.pp * self.cp)

    @property
    def num_layers(self):
        """8 where 4 pipeline ranks hold two chunks each, else 4."""
        return 8 if self.pp == 4 and "interleaved" in self.stages else 4

    @property
    def micro_batch_size(self):
        """Sequences of a micro-batch, so that `micro_batches` of them make the global batch."""
        return GLOBAL_BATCH // (self.dp * self.micro_batches)


def parse_cells(text):
    """The cells of a table, one a line: ranks, then words of `WORDS` and `NUMBERS`."""
    return [_parse_cell(line.split()) for line in text.strip().splitlines()]


def _parse_cell(words):
    values = {"ranks": int(words[0])}
    for word in words[1:]:
        prefix = word.rstrip("0123456789")
        if word in WORDS:
            name, value = WORDS[word]
        else:
            name, value = NUMBERS[prefix], int(word.removeprefix(prefix))
        assert name not in values, f"{word!r} says again what {' '.join(words)!r} has said"
        values[name] = value
    return Cell(**values)


def run_settings(cell):
    """The configuration of the cell."""
    model_and_moe = _shared_settings(cell)
    model_and_moe["moe"]["dispatcher"] = cell.dispatcher
    parallel = {
        "tensor_model_parallel_size": cell.tp,
        "sequence_parallel": cell.tp > 1,
        "pipeline_model_parallel_size": cell.pp,
        "expert_model_parallel_size": cell.ep,
        "expert_tensor_parallel_size": cell.etp,
        "context_parallel_size": cell.cp,
        **OPTIMIZER[cell.optimizer],
    }
    if cell.stages == "interleaved":
        parallel["virtual_pipeline_model_parallel_size"] = 2
    elif cell.stages != "even":
        parallel["pipeline_model_parallel_layout"] = STAGES[cell.stages, cell.pp]
    training = {"micro_batch_size": cell.micro_batch_size, **RECOMPUTE[cell.recompute]}
    return settings(**model_and_moe, parallel=parallel, training=training)


def reference_settings(cell):
    """The configuration of the one process that the cell is compared with."""
    size = cell.micro_batch_size * (cell.dp if cell.scope == "global" else 1)
    return settings(**_shared_settings(cell), training={"micro_batch_size": size})


def _shared_settings(cell):
    """Return settings common to a cell and its reference: model, MoE layers, number format."""
    model = {"num_layers": cell.num_layers, "seq_length": cell.seq_length}
    moe = {"gate_normalization": cell.gates, "balance_scope": cell.scope}
    if cell.layers == "mixed":
        moe["layer_freq"] = [0, 1, 0, 1] * (cell.num_layers // 4)
    moe |= {
        "residual": {},
        "no residual": {"gating_residual": False},
        "two layers": {"two_layer_gate": True},
        "vanilla": VANILLA,
    }[cell.router]
    if "no FFN" in cell.routing:
        # As many as a token selects, so that it can select nothing else.
        moe["num_zero_experts"] = 2
    if cell.capacity:
        moe["capacity_factor"] = 0.9
    match cell.extras:
        case "gqa":
            model["num_query_groups"] = 2
        case "tied":
            model["tie_embeddings"] = True
        case "z loss":
            moe["z_loss_coeff"] = 0.01
        case "shared":
            moe["shared_expert_ffn_hidden_size"] = 16
    return {"model": model, "moe": moe, "precision": {"dtype": cell.dtype}}
