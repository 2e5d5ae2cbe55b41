"""Rules by which tensors of a Hugging Face checkpoint and of ours correspond.

One rule is one tensor of our checkpoint, or one expert's slice of it, and the Hugging Face tensors
that it is made of. Our names are those that megatron-core's `sharded_state_dict` gives; the tests
compare them with a real model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from moepp_megatron.config import Config

Shape = tuple[int, ...]
# Of a `config.json`, or settings of a section of ours.
Fields = dict[str, Any]
# Keys of tensors that no model of ours has: the released model's first gating residual, which its
# code builds and never calls, and what a format asks for although it is constant.
UNUSED_PREFIX = "interop.unused."
_MAX_LISTED = 5


@dataclass(frozen=True)
class TensorRule:
    """One tensor of our checkpoint, or a slice of it along its first axis.

    Attributes:
        key: Name in our checkpoint.
        shape: Shape of the global tensor there.
        index: The slice along the first axis (an expert), or None for the whole tensor.
        sources: Names and shapes of the Hugging Face tensors that it is made of.
        pack: Function from those, in order, to the tensor (or slice, without the first axis).
        unpack: The inverse; None if there is none (upcycling).
        unused: Whether the model has no such parameter; it is kept for the way back, and optional.
    """

    key: str
    shape: Shape
    sources: Mapping[str, Shape]
    index: int | None = None
    pack: Callable[[Sequence[Tensor]], Tensor] = itemgetter(0)
    unpack: Callable[[Tensor], list[Tensor]] | None = lambda tensor: [tensor]
    unused: bool = False

    @property
    def slice_shape(self) -> Shape:
        """Shape of the result of `pack`."""
        return self.shape if self.index is None else self.shape[1:]


Rules = Iterator[TensorRule]


def same(key: str, name: str, *shape: int) -> TensorRule:
    """A tensor that is the same in both."""
    return TensorRule(key, shape, {name: shape})


def row(key: str, count: int, index: int, name: str, *shape: int) -> TensorRule:
    """A Hugging Face tensor that is slice `index` of `count` of ours."""
    return TensorRule(key, (count, *shape), {name: shape}, index)


def unused(name: str, *shape: int) -> TensorRule:
    """A Hugging Face tensor that no parameter of ours is; zeros unless a checkpoint kept it."""
    return TensorRule(UNUSED_PREFIX + name, shape, {name: shape}, unused=True)


def stacked(
    key: str, names: Sequence[str], rows: int, columns: int, experts: tuple[int, int] | None = None
) -> TensorRule:
    """Matrices [rows, columns] one above the other; `experts` = (count, index) of a slice."""
    sources = dict.fromkeys(names, (rows, columns))
    shape: Shape = (len(names) * rows, columns)
    index = None
    if experts is not None:
        count, index = experts
        shape = (count, *shape)
    return TensorRule(
        key,
        shape,
        sources,
        index,
        lambda tensors: torch.cat(list(tensors)),
        lambda tensor: list(tensor.split(rows)),
    )


def decoder_rules(config: Config) -> Rules:
    """Embedding, final norm and output layer."""
    model = config.model
    table = (model.vocab_size, model.hidden_size)
    yield same("embedding.word_embeddings.weight", "model.embed_tokens.weight", *table)
    if not model.tie_embeddings:
        yield same("output_layer.weight", "lm_head.weight", *table)
    yield same("decoder.final_layernorm.weight", "model.norm.weight", model.hidden_size)


def attention_rules(config: Config, layer: int) -> Rules:
    """Attention and both norms of a layer, with Llama's names, which all formats here share."""
    model = config.model
    ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    width, head = model.hidden_size, model.head_dim
    heads, groups = model.num_attention_heads, model.query_groups
    # megatron-core's names of norms are those of its fused norm-and-linear layers.
    norm = "self_attention.linear_qkv.layer_norm_weight"
    yield same(ours + norm, theirs + "input_layernorm.weight", width)
    yield _qkv(ours + "self_attention.linear_qkv.weight", theirs, width, heads, groups, head)
    attention = ours + "self_attention."
    if model.qkv_bias:
        yield _qkv(attention + "linear_qkv.bias", theirs, None, heads, groups, head)
    yield same(
        attention + "linear_proj.weight", theirs + "self_attn.o_proj.weight", width, heads * head
    )
    if model.qk_layernorm:
        counts = {"head": (1, 1), "all_heads": (heads, groups)}
        queries, keys = counts[model.qk_layernorm_scope]
        for kind, count in (("q", queries), ("k", keys)):
            name = f"{theirs}self_attn.{kind}_norm.weight"
            yield same(f"{attention}{kind}_layernorm.weight", name, count * head)
    norm = "mlp.linear_fc1.layer_norm_weight"
    yield same(ours + norm, theirs + "post_attention_layernorm.weight", width)


def _qkv(
    key: str, theirs: str, width: int | None, heads: int, groups: int, head: int
) -> TensorRule:
    """Megatron's order: of each kv head its query heads, key, value; biases without `width`."""
    per_group = heads // groups
    columns = () if width is None else (width,)

    def pack(tensors: Sequence[Tensor]) -> Tensor:
        parts = [tensor.view(groups, -1, *columns) for tensor in tensors]
        return torch.cat(parts, dim=1).reshape(-1, *columns)

    def unpack(tensor: Tensor) -> list[Tensor]:
        parts = tensor.view(groups, (per_group + 2) * head, *columns)
        split = parts.split([per_group * head, head, head], dim=1)
        return [part.reshape(-1, *columns) for part in split]

    what = "bias" if width is None else "weight"
    rows = {"q": heads * head, "k": groups * head, "v": groups * head}
    sources = {
        f"{theirs}self_attn.{kind}_proj.{what}": (count, *columns) for kind, count in rows.items()
    }
    return TensorRule(key, (sum(rows.values()), *columns), sources, None, pack, unpack)


def dense_mlp_rules(config: Config, layer: int) -> Rules:
    """The SwiGLU FFN of a dense layer."""
    width, inner = config.model.hidden_size, config.model.ffn_hidden_size
    yield from _swiglu_rules(
        f"decoder.layers.{layer}.mlp.", f"model.layers.{layer}.mlp.", width, inner
    )


def _swiglu_rules(ours: str, theirs: str, width: int, inner: int) -> Rules:
    """A SwiGLU FFN: gate above up projection, then down projection."""
    names = [theirs + "gate_proj.weight", theirs + "up_proj.weight"]
    yield stacked(ours + "linear_fc1.weight", names, inner, width)
    yield same(ours + "linear_fc2.weight", theirs + "down_proj.weight", width, inner)


def shared_expert_rules(config: Config, ours: str, theirs: str) -> Rules:
    """The expert that every token takes, where the model has one, and its gate."""
    width, inner = config.model.hidden_size, config.moe.shared_expert_ffn_hidden_size
    if inner is not None:
        yield from _swiglu_rules(ours + "shared_experts.", f"{theirs}.", width, inner)
        if config.moe.shared_expert_gate:
            yield same(ours + "shared_experts.gate_weight", f"{theirs}_gate.weight", 1, width)


def linear_modules(config: Config) -> Iterator[tuple[str, int]]:
    """Modules for which megatron-core stores an (empty) extra state, and their number of copies.

    Transformer Engine's modules keep FP8 scales there; megatron-core asks every checkpoint for it.
    """
    for layer, is_moe in enumerate(config.moe.moe_layer_pattern(config.model.num_layers)):
        prefix = f"decoder.layers.{layer}."
        modules = [f"self_attention.{name}" for name in _attention_modules(config)]
        if config.moe.shared_expert_ffn_hidden_size is not None and is_moe:
            modules += ["mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"]
        if not is_moe:
            modules += ["mlp.linear_fc1", "mlp.linear_fc2"]
        yield from ((prefix + module, 1) for module in modules)
        if is_moe:
            for module in ("linear_fc1", "linear_fc2"):
                yield f"{prefix}mlp.experts.experts.{module}", config.moe.num_ffn_experts


def _attention_modules(config: Config) -> list[str]:
    latent = config.model.latent_attention
    if latent is None:
        return ["linear_qkv", "linear_proj"]
    queries = ["linear_q_down_proj", "linear_q_up_proj"]
    if latent.q_lora_rank is None:
        queries = ["linear_q_proj"]
    return [*queries, "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj"]


def differences(
    wanted: Mapping[str, Any], found: Mapping[str, Any], by: str, optional: Iterable[str] = ()
) -> list[str]:
    """List how tensors, by name and shape, differ from those wanted `by` a file."""
    return [
        *_problems_of("is missing", sorted(wanted.keys() - found.keys() - set(optional))),
        *_problems_of("is unexpected", sorted(found.keys() - wanted.keys())),
        *(
            f"tensor {name} must have shape {list(shape)} by {by} and has {list(found[name])}"
            for name, shape in sorted(wanted.items())
            if found.get(name, shape) != shape
        ),
    ]


def _problems_of(what: str, names: Sequence[str]) -> list[str]:
    lines = [f"tensor {name} {what}" for name in names[:_MAX_LISTED]]
    if len(names) > _MAX_LISTED:
        lines.append(f"and {len(names) - _MAX_LISTED} more tensors: each {what}")
    return lines


# The released MoE++ format: `model.layers.N.mlp.moe.{gate,experts}`, with 2 constant, 1 copy and 1
# zero expert in every layer, a one- or two-layer gate and a gating residual. The names extend to
# what it lacks: other counts, a selection bias, a shared expert with its gate, query/key norms.


def moepp_rules(config: Config) -> Rules:
    """Every tensor of a MoE++ model, embedding first, layer by layer."""
    decoder = list(decoder_rules(config))
    yield decoder[0]
    pattern = config.moe.moe_layer_pattern(config.model.num_layers)
    first = pattern.index(True)
    for layer, is_moe in enumerate(pattern):
        yield from attention_rules(config, layer)
        if not is_moe:
            yield from dense_mlp_rules(config, layer)
            continue
        ours, theirs = f"decoder.layers.{layer}.mlp.", f"model.layers.{layer}.mlp.moe."
        yield from _gate_rules(config, ours + "router.", theirs + "gate.", layer == first)
        # Shared constants are the first MoE layer's here, and a copy in each layer there.
        owner = f"decoder.layers.{first}.mlp." if config.moe.constants_shared else ours
        yield from _expert_rules(config, ours, owner, theirs + "experts.experts.")
        yield from shared_expert_rules(config, ours, theirs + "shared_expert")
    yield from decoder[1:]


def _gate_rules(config: Config, ours: str, theirs: str, is_first: bool) -> Rules:
    moe, width = config.moe, config.model.hidden_size
    experts = moe.num_experts
    if moe.two_layer_gate:
        first, second = moe.gate_shapes(width)
        yield same(ours + "weight", theirs + "wg.0.weight", *first)
        yield same(ours + "output_weight", theirs + "wg.2.weight", *second)
    else:
        yield same(ours + "weight", theirs + "wg.weight", experts, width)
    if moe.gating_residual:
        name, shape = theirs + "gate_map.weight", (experts, experts)
        if is_first:
            yield unused(name, *shape)
        else:
            yield same(ours + "residual_weight", name, *shape)
    if moe.selection_bias:
        yield same(ours + "expert_bias", theirs + "e_score_correction_bias", experts)


def _expert_rules(config: Config, ours: str, owner: str, theirs: str) -> Rules:
    moe, width, inner = config.moe, config.model.hidden_size, config.expert_ffn_hidden_size
    count = moe.num_ffn_experts
    for index in range(count):
        prefix, experts = f"{theirs}{index}.", ours + "experts.experts."
        # Gate and up projection are stacked in `up_proj`, gate first, as in megatron-core.
        yield row(
            experts + "linear_fc1.weight", count, index, prefix + "up_proj.weight", 2 * inner, width
        )
        yield row(
            experts + "linear_fc2.weight", count, index, prefix + "down_proj.weight", width, inner
        )
    yield from constant_rules(config, ours, owner, theirs)


def constant_rules(config: Config, ours: str, owner: str, theirs: str) -> Rules:
    """A layer's constant experts, behind its FFN experts; `owner` begins the vectors' name."""
    moe, width = config.moe, config.model.hidden_size
    constants = moe.num_constant_experts
    for index in range(constants):
        prefix, zero = f"{theirs}{moe.num_ffn_experts + index}.", ours + "zero_computation."
        constant = owner + "zero_computation.constants"
        yield row(constant, constants, index, prefix + "constant", width)
        yield row(zero + "mixing_weight", constants, index, prefix + "wg.weight", 2, width)
