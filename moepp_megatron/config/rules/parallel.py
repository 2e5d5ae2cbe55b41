"""Rules of the layout that hold for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.rules.divisibility import must_divide
from moepp_megatron.config.schema import Config
from moepp_megatron.config.stages import expand_pipeline_layout


def _expert_ranks_divide_ffn_experts(config: Config) -> Iterator[Problem]:
    """Every expert-parallel rank holds the same number of FFN experts."""
    yield from must_divide(
        "moe.num_ffn_experts",
        config.moe.num_ffn_experts,
        config.parallel.expert_model_parallel_size,
        "parallel.expert_model_parallel_size",
        others=(),
    )


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
            name,
            width,
            ranks,
            "parallel.tensor_model_parallel_size",
            others=list(widths.values()),
        )


def _query_groups_fit_tensor_ranks(config: Config) -> Iterator[Problem]:
    """Key/value heads are divided among the tensor-parallel ranks, or copied to several."""
    groups, ranks = config.model.query_groups, config.parallel.tensor_model_parallel_size
    if config.model.num_query_groups is not None and groups % ranks and ranks % groups:
        yield Problem(
            "model.num_query_groups",
            groups,
            f"must be a multiple or a divisor of parallel.tensor_model_parallel_size ({ranks})",
            f"use {ranks}, or another number of tensor-parallel ranks",
        )


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


def _tensor_parallel_needs_sequence_parallel(config: Config) -> Iterator[Problem]:
    """megatron-core's MoE layer refuses to train otherwise (moe_layer.py, `forward`)."""
    parallel = config.parallel
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        yield Problem(
            "parallel.sequence_parallel",
            False,
            "must be true with parallel.tensor_model_parallel_size "
            f"({parallel.tensor_model_parallel_size}), because MoE layers need it",
            "set parallel.sequence_parallel to true",
        )


def _sequence_divides_over_ranks(config: Config) -> Iterator[Problem]:
    """Tensor-parallel ranks share out a sequence; context-parallel ranks take two pieces each."""
    parallel = config.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    pieces = tp * (2 * cp if cp > 1 else 1)
    text = f"parallel.tensor_model_parallel_size ({tp})"
    if cp > 1:
        text += f" * 2 * parallel.context_parallel_size ({cp}) = {pieces}"
    yield from must_divide("model.seq_length", config.model.seq_length, pieces, text)


def _param_gather_overlap_has_its_parts(config: Config) -> Iterator[Problem]:
    """Only the distributed optimizer gathers parameters, by the gradient buckets' order."""
    parallel = config.parallel
    for key in ("use_distributed_optimizer", "overlap_grad_reduce"):
        if parallel.overlap_param_gather and not getattr(parallel, key):
            yield Problem(
                "parallel.overlap_param_gather",
                True,
                f"must have parallel.{key} (false) true as well",
                f"set parallel.{key} to true, or parallel.overlap_param_gather to false",
            )


def _virtual_stages_need_pipeline(config: Config) -> Iterator[Problem]:
    """The interleaved schedule needs at least two pipeline ranks."""
    parallel = config.parallel
    chunks = parallel.virtual_pipeline_model_parallel_size
    if chunks is not None and parallel.pipeline_model_parallel_size == 1:
        yield Problem(
            "parallel.virtual_pipeline_model_parallel_size",
            chunks,
            "must be null with parallel.pipeline_model_parallel_size (1)",
            "use null, or set parallel.pipeline_model_parallel_size to 2 or more",
        )


def _layers_divide_over_stages(config: Config) -> Iterator[Problem]:
    """Every stage holds the same number of layers unless there is a layout string."""
    parallel = config.parallel
    if parallel.pipeline_model_parallel_layout is not None:
        return
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


def _pipeline_layout_is_whole(config: Config) -> Iterator[Problem]:
    """A layout string places the embedding, every layer and the loss exactly once."""
    name = "parallel.pipeline_model_parallel_layout"
    text = config.parallel.pipeline_model_parallel_layout
    if text is None:
        return
    remedy = "write for example Ett|tt|ttL: E embedding, t layer, L loss, | between stages"
    try:
        stages = expand_pipeline_layout(text)
    except ValueError as error:
        yield Problem(
            name, text, f"must hold only E, t, m, L, |, comma, (..)*n and x*n, but {error}", remedy
        )
        return
    flat = "".join(stages)
    layers = config.model.num_layers
    if not (flat.startswith("E") and flat.endswith("L")) or flat.count("E") + flat.count("L") != 2:
        yield Problem(name, text, "must start with its only E and end with its only L", remedy)
    elif flat.count("t") != layers:
        yield Problem(
            name,
            text,
            f"must hold t once for each of model.num_layers ({layers}) and holds {flat.count('t')}",
            f"write t {layers} times in all",
        )
    elif flat.count("m") != (depths := config.model.mtp_num_layers):
        yield Problem(
            name,
            text,
            f"must hold m once for each of model.mtp_num_layers ({depths}) and holds "
            f"{flat.count('m')}",
            "write it as often, before L",
        )
    elif depths and not stages[-1].endswith(tail := f"t{'m' * depths}L"):
        yield Problem(
            name,
            text,
            f"must end with {tail}: layers of multi-token prediction take their router logits from "
            "a decoder layer of the same stage",
            f"write {tail} at the end",
        )
    else:
        yield from _stage_count_fits(config, text, len(stages))


def _stage_count_fits(config: Config, text: str, stages: int) -> Iterator[Problem]:
    """The number of stages is that of pipeline ranks, times the chunks of each."""
    name = "parallel.pipeline_model_parallel_layout"
    ranks = config.parallel.pipeline_model_parallel_size
    chunks = config.parallel.virtual_pipeline_model_parallel_size
    wanted = ranks * (chunks or 1)
    if stages % ranks or (chunks is not None and stages != wanted) or (ranks == 1 and stages > 1):
        rule = f"must have as many stages as parallel.pipeline_model_parallel_size ({ranks})"
        if chunks is not None:
            rule += f" * parallel.virtual_pipeline_model_parallel_size ({chunks})"
        elif ranks > 1:
            rule += " or a multiple of it"
        yield Problem(
            name, text, f"{rule} and has {stages}", f"write {wanted} stages separated by |"
        )


RULES = (
    _expert_ranks_divide_ffn_experts,
    _tensor_ranks_divide_widths,
    _query_groups_fit_tensor_ranks,
    _expert_tensor_ranks_divide_expert_width,
    _tensor_parallel_needs_sequence_parallel,
    _sequence_divides_over_ranks,
    _param_gather_overlap_has_its_parts,
    _virtual_stages_need_pipeline,
    _layers_divide_over_stages,
    _pipeline_layout_is_whole,
)
