"""Section `parallel`: how the model is laid out over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from moepp_megatron.config.errors import Problem, show
from moepp_megatron.config.rows import (
    Condition,
    Rule,
    Text,
    divisible,
    group,
    must_divide,
    no_effect_where,
    refuse,
)
from moepp_megatron.config.schema.section import Section, Unit
from moepp_megatron.config.stages import expand_pipeline_layout, virtual_stages
from moepp_megatron.config.world_size import WORLD_SIZE_RULES

if TYPE_CHECKING:
    from moepp_megatron.config.schema import Config


# As in `moepp scale --layout`, and the setting.
DEGREES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}


def _tensor_ranks_divide_widths(config: Config) -> Iterator[Problem]:
    """Every tensor-parallel rank holds the same share of heads, FFN channels and vocabulary."""
    model, moe, ranks = config.model, config.moe, config.parallel.tensor_model_parallel_size
    widths = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.vocab_size": model.vocab_size,
    }
    freq = moe.layer_freq
    if freq != 1 and not (isinstance(freq, list) and 0 not in freq):
        widths["model.ffn_hidden_size"] = model.ffn_hidden_size
    if moe.shared_expert_ffn_hidden_size is not None:
        widths["moe.shared_expert_ffn_hidden_size"] = moe.shared_expert_ffn_hidden_size
    for name, width in widths.items():
        yield from must_divide(
            name, width, ranks, "parallel.tensor_model_parallel_size", others=list(widths.values())
        )


def _query_groups_do_not_fit(config: Config) -> bool:
    groups, ranks = config.model.num_query_groups, config.parallel.tensor_model_parallel_size
    return groups is not None and groups % ranks != 0 and ranks % groups != 0


def _expert_tensor_ranks_divide_expert_width(config: Config) -> Iterator[Problem]:
    """Every rank of a split FFN expert holds the same share of its channels."""
    own = config.moe.ffn_hidden_size is not None
    yield from must_divide(
        "moe.ffn_hidden_size" if own else "model.ffn_hidden_size",
        config.expert_ffn_hidden_size,
        config.parallel.expert_tensor_size,
        "parallel.expert_tensor_parallel_size",
        others=(),
    )


def _sequence_pieces(config: Config) -> int:
    """Tensor-parallel ranks share out a sequence; context-parallel ranks take two pieces each."""
    tp, cp = config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size
    return tp * 2 * cp if cp > 1 else tp


def _sequence_pieces_in_words(config: Config) -> str:
    parallel, pieces = config.parallel, _sequence_pieces(config)
    text = f"parallel.tensor_model_parallel_size ({parallel.tensor_model_parallel_size})"
    cp = parallel.context_parallel_size
    return f"{text} * 2 * parallel.context_parallel_size ({cp}) = {pieces}" if cp > 1 else text


def _layers_divide_over_stages(config: Config) -> Iterator[Problem]:
    """Every stage holds the same number of layers unless there is a layout string."""
    parallel = config.parallel
    stages = parallel.pipeline_model_parallel_size
    text = "parallel.pipeline_model_parallel_size"
    others: tuple[int, ...] | None = ()
    chunks = parallel.virtual_pipeline_model_parallel_size
    if chunks is not None:
        text += f" ({stages}) * parallel.virtual_pipeline_model_parallel_size ({chunks}) = "
        stages *= chunks
        text, others = f"{text}{stages}", None
    unless = " unless parallel.pipeline_model_parallel_layout is set"
    layers = config.model.num_layers
    yield from must_divide("model.num_layers", layers, stages, text, unless, others)


def _layout_is_whole(config: Config) -> Iterator[Problem]:
    """A layout string places the embedding, every layer and the loss exactly once."""
    text, layers = config.parallel.pipeline_model_parallel_layout or "", config.model.num_layers
    depths = config.model.mtp_num_layers
    tail = f"t{'m' * depths}L"
    name = "parallel.pipeline_model_parallel_layout"
    remedy = "write for example Ett|tt|ttL: E embedding, t layer, L loss, | between stages"
    try:
        stages = expand_pipeline_layout(text)
    except ValueError as error:
        rule = f"must hold only E, t, m, L, |, comma, (..)*n and x*n, but {error}"
        yield Problem(name, text, rule, remedy)
        return
    flat = "".join(stages)
    ends, decoder, mtp = flat[:1] + flat[-1:], flat.count("t"), flat.count("m")
    if ends != "EL" or flat.count("E") + flat.count("L") != 2:
        rule = "must start with its only E and end with its only L"
    elif decoder != layers:
        rule = f"must hold t once for each of model.num_layers ({layers}) and holds {decoder}"
        remedy = f"write t {layers} times in all"
    elif mtp != depths:
        rule = f"must hold m once for each of model.mtp_num_layers ({depths}) and holds {mtp}"
        remedy = "write it as often, before L"
    elif depths and not stages[-1].endswith(tail):
        rule = (
            f"must end with {tail}: layers of multi-token prediction take their router logits from "
            "a decoder layer of the same stage"
        )
        remedy = f"write {tail} at the end"
    else:
        yield from _stage_count_fits(config, text, len(stages))
        return
    yield Problem(name, text, rule, remedy)


def _stage_count_fits(config: Config, text: str, stages: int) -> Iterator[Problem]:
    """The number of stages is that of pipeline ranks, times the chunks of each."""
    ranks = config.parallel.pipeline_model_parallel_size
    chunks = config.parallel.virtual_pipeline_model_parallel_size
    wanted = ranks * (chunks or 1)
    if stages % ranks or (chunks is not None and stages != wanted) or (ranks == 1 and stages > 1):
        rule = f"must have as many stages as parallel.pipeline_model_parallel_size ({ranks})"
        if chunks is not None:
            rule += f" * parallel.virtual_pipeline_model_parallel_size ({chunks})"
        elif ranks > 1:
            rule += " or a multiple of it"
        remedy = f"write {wanted} stages separated by |"
        name = "parallel.pipeline_model_parallel_layout"
        yield Problem(name, text, f"{rule} and has {stages}", remedy)


def _split(config: Config) -> list[str]:
    """List recomputed modules that the schedule splits between its nodes."""
    return sorted({"layernorm", "moe"} & config.training.recomputed)


def _has_plain_pipeline(config: Config) -> bool:
    try:
        return config.parallel.pipeline_model_parallel_size > 1 and virtual_stages(config) <= 1
    except ValueError:
        return False  # A layout that cannot be read is refused by a rule of its own.


def _without_split_modules(config: Config) -> str:
    modules, split = show(config.training.recompute_modules), " and ".join(_split(config))
    must = f"must have training.recompute_modules ({modules}) without {split}"
    return f"{must}: the schedule runs their parts separately"


def _needs(wrong: Condition, must: Text) -> Rule:
    return refuse(
        "parallel.overlap_moe_expert_parallel_comm",
        wrong,
        must,
        "change that, or set parallel.overlap_moe_expert_parallel_comm to false",
    )


def _priority_of_groups_of_one(config: Config) -> Iterator[Problem]:
    """A group of one rank sends nothing."""
    parallel, name = config.parallel, "parallel.high_priority_stream_groups"
    for group_name in parallel.high_priority_stream_groups:
        key = DEGREES.get(group_name)
        if key is not None and getattr(parallel, key) == 1:
            reason = f"has no effect on {group_name} with parallel.{key} 1"
            value = parallel.high_priority_stream_groups
            yield Problem(name, value, reason, f"leave {group_name} out")


class ParallelSection(Section):
    """Degrees of parallelism; names follow megatron-core's ModelParallelConfig."""

    tensor_model_parallel_size: Annotated[int, Unit("ranks", ge=1)] = 1
    """Ranks that split each layer"""
    pipeline_model_parallel_size: Annotated[int, Unit("ranks", ge=1)] = 1
    """Pipeline stages"""
    virtual_pipeline_model_parallel_size: Annotated[int | None, Unit("chunks", ge=2)] = None
    """Model chunks per pipeline rank (interleaved schedule); null: one"""
    pipeline_model_parallel_layout: str | None = None
    """Layers per stage, such as Ett|tt|ttL (E embedding, t layer, L loss)"""
    expert_model_parallel_size: Annotated[int, Unit("ranks", ge=1)] = 1
    """Ranks that share out the FFN experts"""
    expert_tensor_parallel_size: Annotated[int | None, Unit("ranks", ge=1)] = None
    """Ranks that split each FFN expert; null means 1"""
    context_parallel_size: Annotated[int, Unit("ranks", ge=1)] = 1
    """Ranks that split the sequence"""
    sequence_parallel: bool = False
    """Split norms and the residual stream over the tensor-parallel ranks"""
    use_distributed_optimizer: bool = True
    """Shard the optimizer state over the data-parallel ranks"""
    overlap_grad_reduce: bool = False
    """Reduce gradients during the backward pass"""
    overlap_param_gather: bool = False
    """Gather parameters during the forward pass"""
    overlap_moe_expert_parallel_comm: bool = False
    """Move the tokens of one micro-batch while another one's layer computes (megatron-core's
    combined schedule of forward and backward)"""
    delay_wgrad_compute: bool = False
    """In the combined schedule: compute gradients of weights after those of activations are on
    their way, so that more work hides what travels"""

    high_priority_stream_groups: list[Literal["tp", "cp", "dp_cp", "pp", "ep", "ep_dp"]] = []
    """Process groups, by megatron-core's names, whose NCCL kernels start before others that wait
    for the GPU"""

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that split each FFN expert, the default resolved."""
        return self.expert_tensor_parallel_size or 1

    @property
    def uses_sequence_parallel(self) -> bool:
        """True if sequence parallelism has an effect.

        megatron-core refuses the flag without tensor parallelism, so it gets this value.
        """
        return self.sequence_parallel and self.tensor_model_parallel_size > 1

    megatron_flags = (
        "tensor-model-parallel-size pipeline-model-parallel-size "
        "num-virtual-stages-per-pipeline-rank=virtual_pipeline_model_parallel_size "
        "pipeline-model-parallel-layout expert-model-parallel-size "
        "expert-tensor-parallel-size context-parallel-size sequence-parallel:true "
        "use-distributed-optimizer:true overlap-grad-reduce:true overlap-param-gather:true "
        "overlap-moe-expert-parallel-comm:true delay-wgrad-compute:true"
    )
    own_rules = (
        divisible(
            "moe.num_ffn_experts",
            lambda c: c.parallel.expert_model_parallel_size,
            "parallel.expert_model_parallel_size",
            others=(),
        ),
        _tensor_ranks_divide_widths,
        # Key/value heads are divided among the tensor-parallel ranks, or copied to several.
        refuse(
            "model.num_query_groups",
            _query_groups_do_not_fit,
            "must be a multiple or a divisor of parallel.tensor_model_parallel_size "
            "({parallel.tensor_model_parallel_size})",
            "use {parallel.tensor_model_parallel_size}, or another number of tensor-parallel ranks",
        ),
        _expert_tensor_ranks_divide_expert_width,
        # megatron-core's MoE layer refuses to train otherwise (moe_layer.py, `forward`).
        refuse(
            "parallel.sequence_parallel",
            "not parallel.tensor_model_parallel_size 1 and not parallel.sequence_parallel",
            "must be true with parallel.tensor_model_parallel_size "
            "({parallel.tensor_model_parallel_size}), because MoE layers need it",
            "set parallel.sequence_parallel to true",
        ),
        divisible("model.seq_length", _sequence_pieces, _sequence_pieces_in_words),
        # Only the distributed optimizer gathers parameters, by the gradient buckets' order.
        refuse(
            "parallel.overlap_param_gather",
            "parallel.overlap_param_gather and not parallel.use_distributed_optimizer",
            "must have parallel.use_distributed_optimizer (false) true as well",
            "set parallel.use_distributed_optimizer to true, or parallel.overlap_param_gather "
            "to false",
        ),
        refuse(
            "parallel.overlap_param_gather",
            "parallel.overlap_param_gather and not parallel.overlap_grad_reduce",
            "must have parallel.overlap_grad_reduce (false) true as well",
            "set parallel.overlap_grad_reduce to true, or parallel.overlap_param_gather to false",
        ),
        refuse(
            "parallel.virtual_pipeline_model_parallel_size",
            "parallel.virtual_pipeline_model_parallel_size and "
            "parallel.pipeline_model_parallel_size 1",
            "must be null with parallel.pipeline_model_parallel_size (1)",
            "use null, or set parallel.pipeline_model_parallel_size to 2 or more",
        ),
        group(
            "parallel.pipeline_model_parallel_layout null",
            _layers_divide_over_stages,
        ),
        group(
            "not parallel.pipeline_model_parallel_layout null",
            _layout_is_whole,
        ),
        group(
            "parallel.overlap_moe_expert_parallel_comm",
            _needs(
                "parallel.expert_model_parallel_size 1",
                "must have parallel.expert_model_parallel_size (1) above 1: no token travels",
            ),
            _needs(
                "not precision.dtype bf16",
                "must have precision.dtype ({precision.dtype}) bf16, which megatron-core's "
                "schedule asks for",
            ),
            _needs(
                lambda c: c.moe.dispatcher not in ("alltoall", "flex"),
                "must have moe.dispatcher ({moe.dispatcher}) alltoall or flex: the schedule frees "
                "what a dispatcher has sent, so it must have arrived when the call returns",
            ),
            _needs(
                _has_plain_pipeline,
                "must have parallel.virtual_pipeline_model_parallel_size (null) 2 or more with "
                "parallel.pipeline_model_parallel_size ({parallel.pipeline_model_parallel_size}): "
                "the plain 1F1B schedule has no combined form",
            ),
            _needs(
                "training.recompute_granularity full",
                "must have training.recompute_granularity (full) null or selective: whole layers "
                "are no longer one piece of the schedule",
            ),
            _needs(_split, _without_split_modules),
        ),
        # No other schedule comes back for the weights (transformer_config.py, `__post_init__`).
        refuse(
            "parallel.delay_wgrad_compute",
            "parallel.delay_wgrad_compute and not parallel.overlap_moe_expert_parallel_comm",
            "must come with parallel.overlap_moe_expert_parallel_comm (false), whose schedule "
            "computes the gradients that are left out at first",
            "set that to true, or parallel.delay_wgrad_compute to false",
        ),
    )
    world_size_rules = WORLD_SIZE_RULES
    no_effect = (
        _priority_of_groups_of_one,
        no_effect_where(
            "parallel.tensor_model_parallel_size 1",
            "with parallel.tensor_model_parallel_size 1",
            "parallel.sequence_parallel",
            "set it to false, or use more tensor-parallel ranks",
        ),
    )
